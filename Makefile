# Two commands on a fresh machine: `make demo` and `make test`. `make check` is what CI runs.

PYTHON ?= python3
VENV ?= .venv
# What pip installs first, options of pip included: the build that the project is tested with.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
# One stamp a TORCH: another build is installed when it is asked for.
INSTALLED = $(VENV)/.installed-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)

.PHONY: demo test slow check lint format types clean

demo: $(INSTALLED)
	$(BIN)/llm2rec demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadscope

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow -n auto --dist loadscope

check: lint types test

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED)
	$(BIN)/mypy

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	rm -f $(VENV)/.installed*
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
