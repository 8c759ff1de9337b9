# Two commands do everything on a fresh machine with Python 3.11+ and a C++ compiler:
#   make quickstart     install into .venv, then run the main job on the embedded corpus
#   make test           the tests, in minutes
#   make test-all       those and the thorough ones (planted mutations, the campaign's short forms), with branch coverage
#   make rehearse       every benchmark at toy size, the GPU check among them
#   make campaign       prove the promises of docs/explanation/reliability.md (ARGS='-k flips': one part)
# For work on the code: make check, make format, make clean.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# --no-build-isolation: DeepSpeed's setup.py looks at the torch it will run with, and the pinned setuptools
# builds every package. DS_BUILD_OPS=0: its C++ ops are compiled when first used, not at installation.
INSTALL := DS_BUILD_OPS=0 $(BIN)/python -m pip -qq --disable-pip-version-check install -c constraints.txt

# torch's extension builder looks for ninja on the PATH
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all test-thorough rehearse campaign check format clean constraints
.DELETE_ON_ERROR:

help:
	@sed -n '1,7s/^# \{0,1\}//p' Makefile

quickstart: $(VENV)/.installed
	$(BIN)/inheritune-ds study quickstart --deepspeed_config ds_configs/cpu.json

# Two workers of one thread each, so that they do not wait for each other. A file stays in one worker, the longest first.
# COVERAGE=1 measures; test-thorough adds to what test has measured, and applies the floor of setup.cfg.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-dev
	$(PYTEST) $(if $(COVERAGE),--cov --cov-report= --cov-fail-under=0) $(ARGS)

test-thorough: $(VENV)/.installed-dev
	$(PYTEST) -m thorough $(if $(COVERAGE),--cov --cov-append --cov-report=term) $(ARGS)

test-all:
	$(MAKE) test COVERAGE=1
	$(MAKE) test-thorough COVERAGE=1

rehearse: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m rehearsal tests/benchmarks $(ARGS)

campaign: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m campaign -o tmp_path_retention_policy=failed tests/campaign $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest --quiet --no-header tests/test_docs.py tests/test_packaging.py
	bash -n .ci/run slurm/*.sbatch

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python docs/generate.py

# Removes what tools and installations made. Results (runs/) and token files (cache/) stay.
clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage .coverage.*
	find inheritune_ds tests benchmarks docs -name __pycache__ -prune -exec rm -rf {} +

# Writes the pins anew from .venv; the comments at the head of the file stay. Run `make test` before and after.
constraints: $(VENV)/.installed-dev
	{ sed -n '/^#/p' constraints.txt; \
	  $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip | sed '/^#/d; s/+[A-Za-z0-9.]*$$//' | LC_ALL=C sort -f; \
	} > constraints.new
	mv constraints.new constraints.txt

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, and '$(PYTHON)' is not one: $$($(PYTHON) --version 2>&1 | head -n 1)" >&2; \
	  echo "  do: make quickstart PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments: its venv module is missing" >&2; \
	  echo "  do: install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { \
	  echo "The C headers of '$(PYTHON)' (Python.h) are missing; DeepSpeed compiles a small C++ module with them" >&2; \
	  echo "  do: install them (Debian, Ubuntu: apt-get install python3-dev)" >&2; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || { \
	  echo "No C++ compiler: '$${CXX:-c++}' is not on the PATH; DeepSpeed compiles a small C++ module at its first start" >&2; \
	  echo "  do: install one (Debian, Ubuntu: apt-get install g++), or name it in CXX" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) (torch first; minutes on a new machine)"
	@$(INSTALL) torch setuptools wheel ninja numpy
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the development tools into $(VENV)"
	@$(INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@
