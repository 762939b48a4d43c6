# `make serve` and `make test` need Python 3.11 to 3.13 and nothing else; everything they install
# goes into .venv. Variables: PYTHON=python3.12, MODEL=..., ARGS="parallel=tp2 ...",
# PYTEST_ARGS="tests/core -x".
PYTHON ?= python3
MODEL ?= smollm2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# What was installed last; a change of the requirements makes them out of date.
SERVE_STAMP := $(VENV)/.installed-serve
TEST_STAMP := $(VENV)/.installed-test
REQUIREMENTS := pyproject.toml constraints.txt
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# A file of tests on a worker for each core; each with one thread, as workers share the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
WORKERS := --numprocesses logical --maxprocesses 8 --dist loadfile

.PHONY: serve test test-all lint fmt bench-smoke help
.DELETE_ON_ERROR:

serve: $(SERVE_STAMP)  ## install and serve MODEL, with ARGS
	@$(BIN)/python -m core.run +model=$(MODEL) $(ARGS)

test: lint  ## install and check in ten minutes: ruff, mypy, tests but those marked slow; or PYTEST_ARGS
ifdef PYTEST_ARGS
	$(BIN)/python -m pytest $(PYTEST_ARGS)
else
	$(PYTEST) $(WORKERS) -m "not slow"
endif

test-all: lint  ## all tests, as continuous integration runs them
	$(PYTEST) $(WORKERS)

lint: $(TEST_STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: $(TEST_STAMP)  ## format, and mend what ruff can without changing what the code does
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-smoke: $(TEST_STAMP)  ## does each benchmark that needs no GPU still run? no figure counts
	$(BIN)/python -m benchmarks.smoke

help:  ## what make can do here
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# torch comes first and alone, so that its build (CPU or CUDA) is settled before anything asks for it.
$(SERVE_STAMP): $(REQUIREMENTS) | $(BIN)/pip
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(TEST_STAMP): $(REQUIREMENTS) | $(BIN)/pip
	$(PIP) torch
	$(PIP) -e '.[test]'
	@touch $@ $(SERVE_STAMP)

$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: $(PYTHON) was not found; install Python 3.11 to 3.13, or: make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
	  "error: $(PYTHON) is Python %d.%d, Nodeweave needs 3.11 to 3.13; for example: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
