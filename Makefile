# make demo: set up and run the demonstration.  make test: set up and run everything CI runs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OUT ?= landscape-demo
PARTS = $(patsubst landscape/%/__init__.py,%,$(wildcard landscape/*/__init__.py)) $(patsubst landscape/%.py,%,$(wildcard landscape/[a-z]*.py))

.PHONY: help demo test check lint bench docs notebooks clean

help:
	@sed -n 's/^\([a-z]*\):.*## /\1: /p' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt torchvision
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[test]
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt deepspeed decent-dp
	touch $@

demo: $(VENV)/.installed ## train, measure, compare with the theory, report (about 10 minutes; resumes)
	$(BIN)/landscape reproduce --preset demo --out $(OUT)

lint: $(VENV)/.installed-test ## lint, type check, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint ## the quick part of the tests (under 3 minutes)
	$(BIN)/python -m pytest -m "not slow" -n 2

test: lint ## lint, type check, import contract and all tests
	$(BIN)/python -m pytest -n 2 -rs

bench: $(VENV)/.installed-test ## speed and accuracy beside pyhessian and curvlinops; results under tests/benchmarks/results
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt einconv opt-einsum
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps curvlinops-for-pytorch backpack-for-pytorch linear_operator
	$(BIN)/python -m tests.benchmarks

docs: $(VENV)/.installed ## the API reference, from the docstrings: docs/api/index.html
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[docs]
	$(BIN)/python -W ignore::UserWarning -m pdoc landscape $(PARTS:%=landscape.%) --docformat google --no-show-source --output-directory docs/api

notebooks: $(VENV)/.installed-test ## run the notebooks anew and keep their figures
	$(BIN)/python -m jupytext --to ipynb --execute notebooks/*.py

clean: ## remove the environment and caches, never a run
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
