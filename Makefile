# Modelyard's commands. Each installs what it needs into .venv first; a second run starts at once.
#
# PYTHON=/path/to/python3   the Python that makes .venv (3.11 or newer)
# ENGINE=cpu|gpu|none       the engine package, instead of the one that suits the machine

PYTHON ?= python3
BIN := .venv/bin
# -S: nothing but the standard library, and no time spent on anything else.
INSTALL := @$(PYTHON) -S requirements/install.py
# Where the environment forbids bytecode, every run would compile all tests and rewrite their assertions again.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
SLOWEST := --durations=25 --durations-min=1
# ONCE=1, but not ONCE=0.
ONCE_FLAG := $(if $(filter-out 0 no false,$(ONCE)),--once)

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-fast check bench lock fmt clean

help:  ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo:  ## A model in service, fine-tuned, compared; MODEL=<Hugging Face id> for a real one, ONCE=1 to end by itself
	$(INSTALL) server engine train
	@$(BIN)/modelyard demo $(if $(MODEL),--model "$(MODEL)") $(ONCE_FLAG)

serve:  ## The server alone, on http://127.0.0.1:8080
	$(INSTALL) server engine train
	@exec $(BIN)/modelyard serve

test:  ## All tests: those with real vLLM beside the fast ones, and the slowest of both; ARGS= goes to pytest
	$(INSTALL) server engine train dev clients
	@# The ones with vLLM mostly wait for one thread; what they print comes last, whole. A worker that takes tests from
	@# another's end leaves those of a module together, whose servers and trainers start once.
	@log=$$(mktemp); status=0; \
	$(PYTEST) -m engine $(SLOWEST) $(ARGS) > "$$log" 2>&1 & engine=$$!; \
	trap 'kill -INT $$engine 2>/dev/null; wait $$engine; rm -f "$$log"' EXIT; trap 'exit 130' INT TERM; \
	$(PYTEST) -n 3 --dist worksteal -m "not engine" $(SLOWEST) $(ARGS) || status=$$?; \
	wait $$engine || status=$$?; \
	cat "$$log"; \
	exit $$status

test-fast:  ## The tests that take no more than a few seconds each, without vLLM
	$(INSTALL) server dev
	@$(PYTEST) -n 2 -m "not engine and not slow" $(ARGS)

check:  ## What needs no running: ruff, mypy (strict), import-linter
	$(INSTALL) server dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench:  ## Measure; writes benchmarks/RESULTS.md
	$(INSTALL) server engine train dev
	@$(BIN)/python benchmarks/startup.py --write
	@$(BIN)/python benchmarks/jobs.py --write
	@$(BIN)/python benchmarks/jobs.py --postgres --write
	@$(BIN)/python benchmarks/datasets.py --write
	@$(BIN)/python benchmarks/deploy.py --write
	@$(BIN)/python benchmarks/changes.py --write
	@$(BIN)/python benchmarks/raw.py --write
	@$(BIN)/python benchmarks/tokenising.py --write
	@$(BIN)/python benchmarks/training.py --write
	@$(BIN)/python benchmarks/engine_client.py --write
	@$(BIN)/python benchmarks/gateway.py --vllm tiny --write $(ARGS)

lock:  ## Pin the requirements again after a change to requirements/*.in; ARGS=--upgrade for newer versions
	$(INSTALL) server
	@$(BIN)/python requirements/lock.py $(ARGS)

fmt:  ## Format, and mend what ruff can
	$(INSTALL) server dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## Remove .venv and caches; models and data stay
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find src tests migrations benchmarks requirements -name __pycache__ -type d -prune -exec rm -rf {} +
