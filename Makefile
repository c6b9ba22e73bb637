# One door: `make run` and `make test` are all that a new user needs. Each sets up ./.venv by itself.
.DEFAULT_GOAL := help
.PHONY: help run test unit contract e2e lint types docs-check chaos soak bench demo-model lock clean

PORT ?= 8080
DATA_DIR ?= ./data
MINUTES ?= 5
SEQUENCES ?= 20000
PYTEST ?= .venv/bin/python -m pytest
PYTEST_ARGS ?=
export OMP_NUM_THREADS ?=

help: ## What can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

run: ## Set up, start the whole stack here, stream one story, stay up until Ctrl-C
	@tools/setup_env.sh run
	@.venv/bin/python tools/make_run.py --port $(PORT) --data-dir $(DATA_DIR)

test: ## Set up and run every test that needs no GPU
	@tools/setup_env.sh dev
	$(PYTEST) -m "not gpu and not slow" $(PYTEST_ARGS)

unit: ## Only the unit tests
	@tools/setup_env.sh dev
	$(PYTEST) tests/unit $(PYTEST_ARGS)

contract: ## The store's contract on fakeredis and on a real server
	@tools/setup_env.sh dev
	$(PYTEST) tests/contract tests/property $(PYTEST_ARGS)

e2e: ## Real processes, real Redis, real model
	@tools/setup_env.sh dev
	$(PYTEST) tests/e2e $(PYTEST_ARGS)

lint: ## ruff, format, import contracts
	@tools/setup_env.sh dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports

types: ## pyright, strict
	@tools/setup_env.sh dev
	.venv/bin/pyright

docs-check: ## Links in the docs, and the CLI reference against --help
	@tools/setup_env.sh dev
	.venv/bin/python tools/check_docs.py

chaos: ## Minutes of faults on every deployment of Redis, and the slow chaos tests (MINUTES=5)
	@tools/setup_env.sh dev
	.venv/bin/python -m tests.chaos.run --minutes $(MINUTES)
	$(PYTEST) tests/chaos -m slow $(PYTEST_ARGS)

soak: ## The store's state machine, the engine under SEQUENCES=20000, a worker's memory over MINUTES=5 (half an hour)
	@tools/setup_env.sh dev
	LLORCH_PROPERTY_EXAMPLES=1500 $(PYTEST) tests/property -k real --timeout 7200 $(PYTEST_ARGS)
	LLORCH_FUZZ_SEQUENCES=$(SEQUENCES) $(PYTEST) tests/engine/test_fuzz.py --timeout 7200 $(PYTEST_ARGS)
	.venv/bin/python -m bench.soak_worker --minutes $(MINUTES)

bench: ## Added latency and CPU of the orchestrator; writes docs/benchmarks.md
	@tools/setup_env.sh dev
	.venv/bin/python -m bench.relay

demo-model: ## Train the demo model again (about 20 minutes on one core)
	@tools/setup_env.sh run
	.venv/bin/python tools/train_demo_model.py

lock: ## Write constraints.txt from ./.venv
	@{ head -1 constraints.txt; .venv/bin/python -m pip freeze --exclude-editable | sed 's/^\(torch==[^+]*\).*/\1/' | sort -f; } > constraints.new
	@mv constraints.new constraints.txt

clean: ## Remove ./.venv, caches and the data of `make run`
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache $(DATA_DIR)
