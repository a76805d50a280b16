# Every target makes .venv and installs what it needs on its first run.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint bench notebooks docs reproduce crash-test scale-test install clean

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"optlab needs Python 3.11 or newer, {sys.executable} is {v.major}.{v.minor}; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# The main job: GNS-Newton against its peers on the mushrooms data.
demo: $(INSTALLED)
	$(BIN)/python -m experiments.logistic_regression --output_dir=results/demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist=loadgroup -m 'not slow and not crash and not scale'
	$(MAKE) --no-print-directory lint

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

# Paired speed ratios against named peers.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

# Slow reproductions.
reproduce: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# Programs killed at random moments and resumed, 60 times.
crash-test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m crash

# A program of each method on 8 devices and in 2 processes: the same numbers.
scale-test: $(INSTALLED)
	$(BIN)/python -m pytest -m scale

# Executes the text twins and writes the pictures into the .ipynb files.
notebooks: $(INSTALLED)
	$(BIN)/python -m notebooks.build

# The pages' cells are executed; a warning is an error.
docs: $(INSTALLED)
	rm -rf docs/_build docs/reference
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo 'Open docs/_build/html/index.html'

clean:
	rm -rf .venv results build docs/_build docs/reference *.egg-info
