# `make demo` and `make test` need Python 3.11 or later and nothing else: they make .venv themselves.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n auto --maxprocesses 8
BENCH_ARGS ?=

RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
TOOLS := $(VENV)/.tools

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint docs bench clean

help:
	@echo "make demo    a walk through the library, under a minute"
	@echo "make test    the tests, in parallel; PYTEST_ARGS='-k name' for some of them"
	@echo "make lint    style, types, and the order of the layers"
	@echo "make docs    the documentation, into docs/_build/html"
	@echo "make bench   what the log costs; BENCH_ARGS='--only full' for a part"
	@echo "make clean   remove what these made, .venv included"

setup: $(READY) $(TOOLS)

# Both are made again only when pyproject.toml is newer. pip knows dependency groups from 25.1 on.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sagalog needs Python 3.11 or later: make PYTHON=python3.12")'
	@test -x $(RUN) || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing sagalog and what its tests need into $(VENV)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable . --group test
	@touch $@

$(TOOLS): $(READY)
	@echo "installing the tools into $(VENV)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check --group lint --group docs --group build
	@touch $@

demo: $(READY)
	$(RUN) -m examples.demo

test: $(READY)
	$(RUN) -m pytest -q $(PYTEST_ARGS)

lint: $(TOOLS)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

docs: $(TOOLS)
	$(RUN) -m sphinx -W --keep-going -q -b html docs docs/_build/html

bench: $(READY)
	$(RUN) benchmarks/log.py $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage
	find sagalog alembic tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
