"""Programs that run one problem with many methods; see the README."""
