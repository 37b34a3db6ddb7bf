# make setup | check | test | test-runs | demo | replicate | bench | clean. Every target does its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup check format test test-runs test-faults test-bad-input test-thorough fuzz soak demo replicate bench bench-gpu clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt $(wildcard deebert/native/*.[ch])
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
	$(PYTEST) --ignore tests/faults --ignore tests/integration/runs

# Whole runs with processes of their own: watched, submitted, killed, starved and fed with what is broken. Longer still.
test-runs: setup
	$(PYTEST) tests/integration/runs tests/faults

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

# One call on a machine with a GPU: parity, and speed whatever parity says; regrouping against shrinking over
# micro-batch budgets, the first of which is the roofline's. GPU_PYTHON=python3 takes an interpreter that has all
# that is needed, and installs nothing; OUT=FOLDER is where the results go.
GPU_PYTHON ?=
GPU_BENCH = $(or $(GPU_PYTHON),$(BIN)/python) -m jobs.bench --suite engine --device cuda --precision bfloat16 \
  --model bert-base --samples 16384 --batch-size 256 --repetitions 3 --mean-exit-layers 3,6,9 \
  --output $(or $(OUT),jobs/bench_results)
bench-gpu: $(if $(GPU_PYTHON),,setup)
	status=0; \
	$(or $(GPU_PYTHON),$(BIN)/python) -m pytest -q tests/gpu || status=1; \
	$(GPU_BENCH) --lengths 128 --micro-batch-tokens 65536,16384,262144 || status=1; \
	$(GPU_BENCH) --lengths short --micro-batch-tokens 65536 || status=1; \
	exit $$status

clean:
	rm -rf $(VENV) .demo .replicate build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
