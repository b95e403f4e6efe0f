.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2

.PHONY: help install demo fashion-mnist lint types test test-slow clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

install: .venv/.installed  ## Make the environment in .venv (once; again when setup.cfg changes)

demo: install  ## Train a teacher and five students on scikit-learn's digits, and compare them
	$(BIN)/python configs/demo/compare.py configs/demo

fashion-mnist: install  ## The same on Fashion-MNIST (about 40 minutes on two cores)
	$(BIN)/python configs/demo/compare.py configs/fashion_mnist

lint: install  ## Check style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: install  ## Check types
	$(BIN)/mypy

test: install  ## Run the fast tests and the examples in the documentation
	$(BIN)/python -m pytest -q

test-slow: install  ## Run the slow tests
	$(BIN)/python -m pytest -q -m slow

clean:  ## Remove the environment, runs and caches
	rm -rf .venv runs build dist *.egg-info .mypy_cache .ruff_cache
