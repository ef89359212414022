# Every target does its own set-up: a venv in .venv, nothing assumed but python3, make and a package registry.

# The first Python that is new enough and can make a venv; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python3.15 \
		$(wildcard $(HOME)/.pyenv/versions/3.1[1-9]*/bin/python3); do \
	$$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
# Two stamps: what the library needs to run, and what its developers need on top of that.
RUN := $(VENV)/.run
DEV := $(VENV)/.dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The tests run side by side, a worker more than there are cores, since many wait; who has finished takes over from who has not.
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: help demo test check format test-all slow compat compat-all bench clean

help:
	@echo "make demo        what a client sees when its server goes wrong, with plain pyzmq and with greensafe: a minute with the set-up"
	@echo "make test        the tests of every module: less than three minutes on two cores"
	@echo "make check       format, lint, types, layers and all tests: before a commit, and what .ci/run calls; up to 25 minutes"
	@echo "make format      put the code into the format that make check wants"
	@echo "make test-all    all tests, on every Python from 3.11 on that is installed"
	@echo "make slow        the long runs: soaks, every point of failure, large transfers"
	@echo "make compat      pyzmq's own tests of zmq.green, on greensafe; make compat-all: in every mode"
	@echo "make bench       the benchmarks"
	@echo "make clean       remove what the others have made"
	@echo "PYTEST_ARGS='...' goes to pytest, as in: make test PYTEST_ARGS='-n 0 -x tests/server/test_server.py'. See docs/testing.md."

demo: $(RUN)
	@$(BIN)/python examples/demo.py

test: $(DEV)
	$(PYTEST) -m "not check and not slow" $(PYTEST_ARGS)

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-all:
	@sh tests/all_pythons.sh

slow: $(DEV)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# pyzmq's own green tests with greensafe in the place of zmq.green; by a second, independent runner as well where one lies beside
# the checkout.
ACCEPTANCE := $(wildcard ../shared/acceptance/pyzmq_green)

compat: $(DEV)
	$(BIN)/python tests/compat/run.py $(COMPAT_ARGS)
ifneq ($(ACCEPTANCE),)
	PYTHON=$(BIN)/python GREEN_MODULE=greensafe GREEN_DEVIATIONS=$(abspath $(ACCEPTANCE)/deviations.txt) $(ACCEPTANCE)/run.sh
endif

# In every mode; a few minutes.
compat-all:
	$(MAKE) compat COMPAT_ARGS="green monkey libuv all forced"

bench: $(DEV)
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

clean:
	rm -rf .venv* .compat build dist *.egg-info .mypy_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache
	find benchmarks examples greensafe tests -name __pycache__ -prune -exec rm -rf {} +

# A stamp comes last, so a set-up that was interrupted is done again, and a finished one only when its inputs change.
$(RUN): setup.cfg setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python from 3.11 on (with ensurepip) was found: set PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable .
	@touch $@

$(DEV): $(RUN)
	@echo "adding the developers' tools to $(VENV)"
	@$(PIP) --upgrade pip
	@$(PIP) --editable ".[dev]"
	@touch $@
