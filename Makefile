# make setup | check | test | test-kills | demo | replicate | bench | clean. Every target does its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup check format test test-kills test-faults test-bad-input test-thorough fuzz soak demo replicate bench bench-gpu clean

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

# One at a time for each of two cores, a file's tests together: each start of Ray is eight processes by itself.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --durations 15
test: setup
	$(PYTEST) --ignore tests/faults

# Whole runs that are killed, starved and fed with what is broken: as long again.
test-kills: setup
	$(PYTEST) tests/faults

# 45 seeds of 5 random kills, of which about 200 find something to kill (an hour); FAULTS.jsonl gets a line per seed.
test-faults: setup
	DEEBERT_FAULT_SEEDS=45 DEEBERT_FAULT_REPORT=FAULTS.jsonl $(BIN)/python -m pytest -q tests/faults/test_random_kills.py

# Every kind of bad input, as a table.
test-bad-input: setup
	$(BIN)/python -m tests.faults.bad_input > tests/faults/BAD_INPUT.md.new
	mv tests/faults/BAD_INPUT.md.new tests/faults/BAD_INPUT.md

# 10,000 cases for each property of the engine, 3,000 for the planner's.
test-thorough: setup
	DEEBERT_EXAMPLES=50 $(BIN)/python -m pytest -q --timeout 3600 tests/unit/test_engine_properties.py tests/unit/test_shards.py

fuzz: setup
	$(BIN)/python -m tests.faults.fuzz_readers 10

soak: setup
	$(BIN)/python -m tests.faults.soak 30

demo: setup
	$(BIN)/python -m jobs.demo

# The paper's experiments: make replicate ASSETS=folder (real weights and labelled data).
ASSETS ?= $(or $(DEEBERT_ASSETS),../shared/assets)
replicate: setup
	$(BIN)/python -m jobs.replicate --assets $(ASSETS)

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
	rm -rf $(VENV) .demo .replicate build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
