PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=
GPU_MINUTES ?= 8
BIN := .venv/bin
# Over the newest transformers, for the second run of gemma_fast.hf's tests.
OLDEST := .venv/oldest-transformers

.PHONY: demo test lint bench gpu

demo: .venv/demo.stamp
	@$(BIN)/gemma-fast predict "I want to move"
	@$(BIN)/gemma-fast generate "I want to move" --max-new-tokens 30

test: .venv/test.stamp $(OLDEST)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)
	@PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest $(PYTEST_ARGS) tests/hf

lint: .venv/test.stamp
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

bench: .venv/bench.stamp
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

# Installs nothing: a GPU may be there for minutes, on a machine without a network.
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

$(BIN)/pip:
	@echo "Creating .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv
