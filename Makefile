# Every target does its own set-up: a venv in .venv, nothing assumed but python3, make and a package registry.

# The first Python that is new enough and can make a venv; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python3.15 \
		$(wildcard $(HOME)/.pyenv/versions/3.1[1-9]*/bin/python3); do \
	$$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check format test-all slow compat compat-all bench clean

demo: $(READY)
	@$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-all:
	@sh tests/all_pythons.sh

slow: $(READY)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# pyzmq's own green tests with greensafe in the place of zmq.green; by a second, independent runner as well where one lies beside
# the checkout.
ACCEPTANCE := $(wildcard ../shared/acceptance/pyzmq_green)

compat: $(READY)
	$(BIN)/python tests/compat/run.py $(COMPAT_ARGS)
ifneq ($(ACCEPTANCE),)
	PYTHON=$(BIN)/python GREEN_MODULE=greensafe GREEN_DEVIATIONS=$(abspath $(ACCEPTANCE)/deviations.txt) $(ACCEPTANCE)/run.sh
endif

# In every mode; a few minutes.
compat-all:
	$(MAKE) compat COMPAT_ARGS="green monkey libuv all forced"

bench: $(READY)
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

clean:
	rm -rf .venv* .compat build dist *.egg-info .mypy_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache
	find benchmarks examples greensafe tests -name __pycache__ -prune -exec rm -rf {} +

# The stamp comes last, so a set-up that was interrupted is done again, and a finished one only when its inputs change.
$(READY): setup.cfg setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python from 3.11 on (with ensurepip) was found: set PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip "setuptools>=77"
	@$(PIP) --editable ".[dev]"
	@touch $@
