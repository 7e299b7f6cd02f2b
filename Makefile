# Two commands on a fresh machine: `make demo` and `make test`. Needed: Python 3.11 or newer, pip, make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OLDEST := 3.11
# a test file is one worker's; several threads in each of several workers would wait for each other
WORKERS := -n auto --maxprocesses 4 --dist loadfile
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: help demo test test-slow test-all check format format-check lint types imports docs docs-check clean distclean
.DEFAULT_GOAL := help

help: ## say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed ## teach a small model invented people, remove some, write runs/demo/report.html
	$(BIN)/expunge demo

test: $(VENV)/.installed-dev ## the fast tests
	$(ONE_THREAD) $(BIN)/python -m pytest $(WORKERS)

test-slow: $(VENV)/.installed-dev ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-all: $(VENV)/.installed-dev ## every test
	$(BIN)/python -m pytest -m "slow or not slow"

check: format-check lint types imports docs-check test ## all that a change must pass

format: $(VENV)/.installed-dev ## put every file into the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

format-check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .

lint: $(VENV)/.installed-dev ## ruff
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev ## mypy
	$(BIN)/mypy

imports: $(VENV)/.installed-dev ## the direction of imports between the rooms
	$(BIN)/lint-imports

docs: $(VENV)/.installed-dev ## fill the generated tables in README.md and docs/
	$(BIN)/python scripts/generate_docs.py

docs-check: $(VENV)/.installed-dev
	$(BIN)/python scripts/generate_docs.py --check

clean: ## remove caches and build leftovers; .venv and runs stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## remove .venv too; runs stay
	rm -rf $(VENV)

# A stamp of its own: a python in .venv may be the half of a venv that was interrupted.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(tuple(sys.version_info[:2]) < tuple(map(int, "$(OLDEST)".split("."))))' || { \
	  echo "error: expunge needs Python $(OLDEST) or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)" >&2; \
	  echo "hint: name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.created
	@echo 'installing into $(VENV): some minutes and gigabytes the first time (torch)'
	$(PIP) install --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.created
	@echo 'installing into $(VENV), with what the tests need: some minutes and gigabytes the first time (torch)'
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.installed
