# `make demo` and `make test` are all that a fresh machine with Python and make needs.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := $(VENV)/.demo
CODE := structprune tests examples docs/assets .ci/lowest.py $(wildcard benchmarks)

.PHONY: help install demo test lint types tests lowest dist docs bench zoo ops format clean

help:
	@echo "make demo    train a small network on handwritten digits, prune it, recover it, export it and time it"
	@echo "make test    lint, types, tests"
	@echo "make lint    ruff: rules and formatting"
	@echo "make types   pyright, strict"
	@echo "make tests   pytest alone"
	@echo "make lowest  the core tests with the lowest versions that pyproject.toml declares, in .venv-lowest"
	@echo "make dist    build wheel and sdist, look into them, and prune with the wheel in an environment of its own"
	@echo "make docs    the documentation, into site/; any broken link is an error"
	@echo "make bench   time whole calls against torch-pruning"
	@echo "make zoo     prune every model of the zoo (takes long)"
	@echo "make ops     prune networks around every operation of torch's own test database"
	@echo "make format  let ruff rewrite the files"
	@echo "make clean   remove the environment and all caches"

install: $(INSTALLED)

# torch goes first and alone: asked for with an exact version, pip takes a CPU build where it is offered one.
$(DEMO): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -c constraints.txt -e '.[demo]'
	touch $@

$(INSTALLED): $(DEMO)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

demo: $(DEMO)
	$(BIN)/python examples/digits.py

# One after the other, whatever -j says: the cheapest check speaks first.
test: $(INSTALLED)
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory types
	$(MAKE) --no-print-directory tests

lint: $(INSTALLED)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(INSTALLED)
	$(BIN)/pyright --pythonpath $(BIN)/python

tests: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS)

# TORCH=2.13.0+cpu, say, where the lowest torch is not to be had.
lowest:
	$(PYTHON) .ci/lowest.py --jobs $(JOBS) $(if $(TORCH),--torch $(TORCH))

# The environment has what the build needs, so that nothing is fetched for it.
dist: $(INSTALLED)
	rm -rf dist build
	$(BIN)/python -m build --no-isolation
	STRUCTPRUNE_DIST=dist $(BIN)/python -m pytest -q -p no:xdist tests/test_packaging.py

# The variable silences a note of the theme's authors about its successor.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(INSTALLED)
	$(BIN)/python benchmarks/tool_speed.py

zoo: $(INSTALLED)
	$(BIN)/python benchmarks/zoo.py

ops: $(INSTALLED)
	$(BIN)/python benchmarks/operations.py --jobs $(JOBS)

format: $(INSTALLED)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean:
	rm -rf $(VENV) .venv-lowest .pytest_cache .ruff_cache .hypothesis build dist site *.egg-info
