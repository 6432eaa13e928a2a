# Two commands for users: `make demo` and `make test`. The rest are helpers for those who work on moegen.
# On a fresh machine: Python 3.11 or newer with venv; another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
OLDER_TRITON := 3.6.0

VENV := .venv
BIN := $(VENV)/bin
WORKERS := 2

.PHONY: demo test lint check unit interp format wheel clean

demo: $(VENV)/.installed
	$(BIN)/python tools/demo.py

test: lint check unit interp

# The steps of `make test`; the whole needs no GPU: tests that do skip with a reason.
lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Exit code 5: a record is stale. It works, and to renew it takes its GPU, so it is shown and does not fail.
check: $(VENV)/.installed-test
	$(BIN)/moegen check || [ $$? -eq 5 ]

# One OpenMP thread a worker: the workers already fill the cores.
unit: $(VENV)/.installed-test .triton-$(OLDER_TRITON)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --ignore=tests/interp tests

# A run of its own, because Triton reads TRITON_INTERPRET when a kernel is defined (tests/interp/conftest.py).
interp: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) tests/interp

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.installed-test
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

clean:
	rm -rf build dist out moegen.egg-info .pytest_cache .mypy_cache .ruff_cache

# Set-up. The stamps make it run once, and again only when what is to be installed changes.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "make: $(PYTHON) is older than Python 3.11; try: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	@touch $(VENV)/.installed $@

# The other supported Triton, for tests that compile every variant with both.
.triton-$(OLDER_TRITON)/.installed: | $(BIN)/python
	rm -rf $(@D)
	$(BIN)/pip install --quiet --no-deps --target $(@D) triton==$(OLDER_TRITON)
	@touch $@
