PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=
BIN := .venv/bin

.PHONY: demo test lint bench

demo: .venv/demo.stamp
	@$(BIN)/gemma-fast predict "I want to move"
	@$(BIN)/gemma-fast generate "I want to move" --max-new-tokens 30

test: .venv/test.stamp
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: .venv/test.stamp
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

bench: .venv/bench.stamp
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

# One stamp per extra: a second run installs nothing.
.venv/%.stamp: setup.py pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing gemma_fast[$*] into .venv (the first time takes minutes)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@

$(BIN)/pip:
	@echo "Creating .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv
