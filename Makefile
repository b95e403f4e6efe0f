.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2

.PHONY: help install demo fashion-mnist replication lint types docs test test-slow coverage bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

install: .venv/.installed  ## Make the environment in .venv (once; again when setup.cfg changes)

demo: install  ## Train a teacher and students by six methods on scikit-learn's digits, three seeds each, and compare (5 minutes)
	@rm -rf runs/demo
	@$(BIN)/python -m tests.replication.demo
	@echo
	@echo "Next: $(BIN)/tensorboard --logdir runs/demo"
	@echo "      $(BIN)/kdvit check --config configs/lift.yaml --data.init_args.root /path/to/imagenet"
	@echo "      $(BIN)/kdvit fit --config configs/demo/lift.yaml --model.distillers.lift.weight 2 \\"
	@echo "          --trainer.max_epochs 24 --trainer.default_root_dir runs/demo/lift_2"
	@echo "      make fashion-mnist"

METHODS := teacher plain soft_kd feature lift wide_last

fashion-mnist: install  ## A larger teacher and student on Fashion-MNIST (about 30 minutes on two cores; goes on where it stopped)
	@for method in $(METHODS); do \
		echo "$$ kdvit fit --config configs/fashion_mnist/$$method.yaml"; \
		$(BIN)/kdvit fit --config configs/fashion_mnist/$$method.yaml || exit 1; done
	@$(BIN)/kdvit compare $(METHODS:%=runs/fashion_mnist/%) --out runs/fashion_mnist

# the same memory settings as for bench: faster, and the same for all arms
replication: export MALLOC_MMAP_THRESHOLD_ = 1073741824
replication: export MALLOC_TRIM_THRESHOLD_ = 4294967296
replication: export MALLOC_TOP_PAD_ = 268435456
replication: install  ## What helps a small student, with seeds and intervals (hours; goes on where it stopped); REPLICATION="OPTIONS"
	$(BIN)/python -m tests.replication $(REPLICATION)

lint: install  ## Check style and spelling
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/codespell

types: install  ## Check types
	$(BIN)/mypy

docs: install  ## Write the site of all pages and of the API to build/docs; a broken link fails
	$(BIN)/python .ci/docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --config-file .ci/mkdocs.yml

test: install  ## Run the fast tests and the examples in the documentation
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

test-slow: install  ## Run the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow -n 2 --dist loadfile --deselect tests/slurm
	$(BIN)/python -m pytest -q -m slow tests/slurm

coverage: install  ## Run the fast tests, list the lines that they miss, and write htmlcov/index.html
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal --cov --cov-report term --cov-report html

# glibc then keeps the memory of large tensors, for both sides of each comparison
bench: export MALLOC_MMAP_THRESHOLD_ = 1073741824
bench: export MALLOC_TRIM_THRESHOLD_ = 4294967296
bench: export MALLOC_TOP_PAD_ = 268435456
bench: install  ## Measure the step and the teacher against plain PyTorch and timm (15 minutes; 8 on a GPU); BENCH="NAMES --rounds N"
	@mkdir -p runs
	$(BIN)/python -m tests.bench $(BENCH) --out runs/bench.json

clean:  ## Remove the environment, runs and caches
	rm -rf .venv runs build dist *.egg-info .mypy_cache .ruff_cache .coverage* htmlcov
