PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=
GPU_MINUTES ?= 8
BIN := .venv/bin
# One process per core, at most eight. Each test file runs in one: its fixtures may take a gigabyte.
PYTEST := -m pytest -n auto --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)
# The oldest transformers, put before the pinned one for a second run of gemma_fast.hf's tests.
OLDEST := .venv/oldest-transformers
NEWEST := .venv-newest
# Besides the pinned version: the oldest, the newest, and those in between that a torch requires.
TRITONS := .venv/triton-3.6.0 .venv/triton-3.8.0 .venv/triton-3.9.0
# Tests that compile every launch for compute capability 9.0, and one per kernel for other GPUs.
COMPILE := -m "" -k "90 or first" tests/kernels/test_compile.py

.PHONY: demo test test-all test-newest tritons lint bench gpu

demo: .venv/demo.stamp
	@$(BIN)/gemma-fast predict "I want to move"
	@$(BIN)/gemma-fast generate "I want to move" --max-new-tokens 30

# Skips the tests marked slow.
test: .venv/test.stamp
	@$(BIN)/python $(PYTEST)

test-all: .venv/test.stamp $(OLDEST) $(firstword $(TRITONS)) $(lastword $(TRITONS))
	@$(BIN)/python $(PYTEST) -m ""
	@PYTHONPATH=$(OLDEST) $(BIN)/python $(PYTEST) tests/hf
	@PYTHONPATH=$(firstword $(TRITONS)) $(BIN)/python $(PYTEST) $(COMPILE)
	@PYTHONPATH=$(lastword $(TRITONS)) $(BIN)/python $(PYTEST) $(COMPILE)

# Compiles every kernel for each GPU with each of these versions; prints one table.
tritons: .venv/test.stamp $(TRITONS)
	@PYTHONPATH=. $(BIN)/python tests/support/tritons.py $(TRITONS)

# Tests with the newest torch, triton and transformers. Downloads gigabytes: torch for CUDA.
test-newest: $(NEWEST)/bin/pip
	@echo "Installing gemma_fast[test] into $(NEWEST)"
	@sed -E '/^(torch|triton|transformers)==/d' constraints.txt > $(NEWEST)/constraints.txt
	@$(NEWEST)/bin/pip install --quiet --disable-pip-version-check --upgrade \
		--upgrade-strategy eager -c $(NEWEST)/constraints.txt -e ".[test]"
	@$(NEWEST)/bin/python $(PYTEST) -m ""

lint: .venv/test.stamp
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

bench: .venv/bench.stamp
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

# Installs nothing: the GPU machine may be available for minutes only, and have no network.
gpu:
	@PYTHONPATH=. $(shell command -v $(BIN)/python || echo $(PYTHON)) -m benchmarks.gpu --minutes $(GPU_MINUTES)

# One stamp per extra: a second run installs nothing.
.venv/%.stamp: setup.py pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing gemma_fast[$*] into .venv (the first time takes minutes)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@

$(OLDEST): tests/hf/oldest.txt .venv/test.stamp
	@rm -rf $@
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ -r $<
	@touch $@

.venv/triton-%: | .venv/test.stamp
	@echo "Installing Triton $* into $@"
	@rm -rf $@ $@.part
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@.part triton==$*
	@mv $@.part $@

$(BIN)/pip $(NEWEST)/bin/pip:
	@echo "Creating $(@:/bin/pip=) with $(PYTHON)"
	@$(PYTHON) -m venv $(@:/bin/pip=)
