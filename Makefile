# Needs make, Python 3.11 or newer with venv, and a package index. Everything is installed into .venv.

PYTHON ?= python3
JOBS ?= 2

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := .venv/bin
PINS := pyproject.toml $(wildcard constraints/*.txt)
DEMO := train,cpu,tensorrt-rtx
TEST := $(DEMO),vision,hf,docs,dev

# $(1): the extras. The pins are those of the Python that .venv was made with.
define install
pins=constraints/$$($(BIN)/python -c 'import sys; print("py%d%d" % sys.version_info[:2])').txt; \
test -f $$pins || { echo "no $$pins: make .venv with one of the Pythons in constraints/ (make PYTHON=...)" >&2; exit 1; }; \
echo "installing sparsify-deploy[$(1)] into .venv with $$pins"; \
$(BIN)/python -m pip install -qq -c $$pins --config-settings editable_mode=compat -e '.[$(1)]'
endef

.PHONY: help demo test test-all lint schema docs bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/make \1\t\2/p' Makefile | expand -t 15

demo: .venv/.installed-demo ## a network from nothing to a 2:4 INT8 engine and a verdict, on the CPU
	@$(BIN)/sparsify-deploy run recipes/digits.yaml

test: lint ## lint, then the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-all: lint ## as test, then the long attacks: an hour or more
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: .venv/.installed-test ## ruff, mypy, the import rules, the Dockerfile
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/hadolint Dockerfile

schema: .venv/.installed-demo ## write sparsify_deploy/recipe.schema.json anew
	@$(BIN)/python -c 'from sparsify_deploy.recipe_source import write_schema; write_schema()'

docs: .venv/.installed-test ## the documentation, into build/site; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'build/site/index.html; $(BIN)/mkdocs serve shows it with its search'

bench: ## how the measurements are made
	@echo 'Each prints its figures, with --json for machines; run one at a time on a quiet machine:'
	@for script in benchmarks/*.py; do \
	  case $$script in */methods.py) rest=' mnist|cifar10|rewiring --data PATH' ;; */routes.py) rest=' --data PATH' ;; *) rest= ;; esac; \
	  echo "  $(BIN)/python $$script$$rest"; \
	done

clean: ## remove caches and build folders; .venv and runs/ stay
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find sparsify_deploy tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.version_info >= (3, 11) or sys.exit( \
	  "Python 3.11 or newer is needed to train and this is " + v + ": make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv .venv

.venv/.installed-demo: .venv/bin/python $(PINS)
	@$(call install,$(DEMO))
	@touch $@

.venv/.installed-test: .venv/bin/python $(PINS)
	@$(call install,$(TEST))
	@touch .venv/.installed-demo $@
