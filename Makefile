# Two commands on a fresh machine: `make demo` and `make test`. `make check` is what CI runs.

PYTHON ?= python3
VENV ?= .venv
# Installed first: a bare `torch` takes the newest build, on Linux one with gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin

.PHONY: demo test slow check lint format types clean

demo: $(VENV)/.installed
	$(BIN)/llm2rec demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadscope

slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow -n auto --dist loadscope

check: lint types test

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
