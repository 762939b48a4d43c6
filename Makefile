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

KERNEL_TESTS := $(filter-out %/test_comm.py %/test_moe_a2a.py,$(wildcard tests/contracts/test_*.py))

.PHONY: serve test lint
.DELETE_ON_ERROR:

serve: $(SERVE_STAMP)
	@$(BIN)/python -m core.run +model=$(MODEL) $(ARGS)

# All of it, unless PYTEST_ARGS says what. Triton's interpreter takes one core for minutes, so that the
# tests of kernels run on all; those that start ranks, servers and nodes run one after the other.
test: lint
ifdef PYTEST_ARGS
	$(BIN)/python -m pytest $(PYTEST_ARGS)
else
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 $(KERNEL_TESTS)
	$(BIN)/python -m pytest $(KERNEL_TESTS:%=--ignore=%)
endif

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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
