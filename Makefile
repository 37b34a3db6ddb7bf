# make setup | check | test | demo | replicate | clean. Every target does its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup check format test demo replicate clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_imports.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: setup
	$(BIN)/python -m pytest

demo: setup
	$(BIN)/python -m jobs.demo

# The paper's experiments: make replicate ASSETS=folder (real weights and labelled data).
ASSETS ?= $(or $(DEEBERT_ASSETS),../shared/assets)
replicate: setup
	$(BIN)/python -m jobs.replicate --assets $(ASSETS)

clean:
	rm -rf $(VENV) .demo .replicate build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
