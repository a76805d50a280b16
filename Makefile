# Every target makes .venv and installs what it needs on its first run. Another
# Python has a folder of its own: make PYTHON=python3.13 VENV=.venv-3.13 test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test quick lint bench notebooks docs reproduce slow-test crash-test install clean

install: $(INSTALLED)

$(INSTALLED): setup.cfg setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"optlab needs Python 3.11 or newer, {sys.executable} is {v.major}.{v.minor}; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# The main job: GNS-Newton against its peers on the mushrooms data.
demo: $(INSTALLED)
	$(BIN)/python -m experiments.logistic_regression --output_dir=results/demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist=loadgroup -m 'not slow and not crash'
	$(MAKE) --no-print-directory lint

# For the hand: the tests of what was changed, in under 90 seconds.
quick: $(INSTALLED)
	$(BIN)/python -m tests.quick

# The last two see optlab as a user does: installed, from another folder.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	cd tests/typing && $(abspath $(BIN))/pyright --pythonpath $(abspath $(BIN))/python user.py
	cd tests/typing && $(abspath $(BIN))/mypy --strict user.py

# Paired speed ratios against named peers.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

# The claims of the six papers, each by a reduced run: a table, in 40 minutes.
# OPTLAB_DATA names a folder with TREC and a8a; without it they are left out.
reproduce: $(INSTALLED)
	$(BIN)/python -m experiments.reproduce --data_dir=$(OPTLAB_DATA)

# Programs killed at random moments and resumed, 85 times.
crash-test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m crash

# Eight devices and two processes give the numbers of one; long runs end to end.
slow-test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist=loadgroup -m slow

# Executes the text twins and writes the pictures into the .ipynb files.
notebooks: $(INSTALLED)
	$(BIN)/python -m notebooks.build

# The pages' cells are executed; a warning is an error.
docs: $(INSTALLED)
	rm -rf docs/_build docs/reference
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo 'Open docs/_build/html/index.html'

clean:
	rm -rf $(VENV) .jax_cache results build dist docs/_build docs/reference *.egg-info
