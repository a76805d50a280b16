"""Programs that run one problem with many methods; see the README."""

import os

# Before JAX is loaded: XLA's "Very slow compile?" says nothing to a user, whom
# `lab.progress` tells what takes long. Its errors come as exceptions too.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
