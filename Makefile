# make setup | check | test | demo | bench | bench-gpu | clean. Every target does its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup check format test demo bench bench-gpu clean

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

# Engine and pipeline against baselines on this machine; results in jobs/bench_results/.
bench: setup
	$(PIP) install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m jobs.bench --suite all

# One call on a machine with a GPU: parity first, then speed, regrouping against shrinking over micro-batch budgets.
bench-gpu: setup
	$(BIN)/python -m pytest -q tests/gpu
	$(BIN)/python -m jobs.bench --suite engine --device cuda --precision bfloat16 --model bert-base \
	  --lengths 128 --samples 16384 --micro-batch-tokens 4096,16384,65536,262144 --batch-size 256

clean:
	rm -rf $(VENV) .demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
