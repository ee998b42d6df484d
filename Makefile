# Every command a person or CI needs; `make help` lists them. Needs make and Python >= 3.11, nothing else.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MEMBERS := proto $(wildcard libs/*) $(wildcard services/*)
SOURCES := $(addsuffix /src,$(MEMBERS))
TESTS := $(wildcard $(addsuffix /tests,$(MEMBERS)) tests/*)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export LLMPILOT_DATA ?= $(abspath ../shared/data)

.PHONY: help setup run up test test-real lint types proto baseline lock verify bench ci clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

setup: $(VENV)/.runtime ## create the environment from requirements.lock

$(VENV)/.runtime: requirements.lock $(addsuffix /pyproject.toml,$(MEMBERS))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; name another with make PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the locked requirements into $(VENV) ..."
	@$(PIP) --require-hashes -r requirements.lock
	@$(PIP) --no-deps --no-build-isolation $(addprefix -e ./,$(MEMBERS))
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.runtime
	@echo "installing the development tools into $(VENV) ..."
	@$(PIP) --require-hashes -r requirements-dev.lock
	@touch $@

$(VENV)/.torch: requirements-torch.txt $(VENV)/.runtime
	@echo "installing PyTorch into $(VENV) ..."
	@$(PIP) -r requirements-torch.txt
	@touch $@

run: $(VENV)/.runtime ## the main job: recommend GPUs for an LLM that nobody measured, then stop everything
	@$(BIN)/llm-pilot recommend --config meta-llama/Llama-3.1-8B --users 200 --nttft-ms 100 --itl-ms 50

up: $(VENV)/.runtime ## keep the platform running and print where to call it
	@$(BIN)/llm-pilot up

test: $(VENV)/.dev $(VENV)/.torch ## run every test (real data from LLMPILOT_DATA, ../shared/data unless set; skipped where absent)
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-real: $(VENV)/.dev ## the load tester against a server that nobody here wrote: LLMPILOT_REAL_SERVER=http://HOST:PORT
	$(BIN)/python -m pytest $(PYTEST_FLAGS) tests/real

lint: $(VENV)/.dev ## ruff, import-linter, buf lint, buf breaking
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	cd proto && ../$(BIN)/buf lint && ../$(BIN)/buf format --diff --exit-code && ../$(BIN)/buf breaking --against baseline.binpb

space := $(subst ,, )
types: export MYPYPATH = $(subst $(space),:,$(strip $(SOURCES) benchmarks))
types: $(VENV)/.dev ## mypy --strict, sources and tests
	$(BIN)/mypy $(SOURCES)
	@for tests in $(TESTS) benchmarks conftest.py; do $(BIN)/mypy $$tests || exit 1; done

proto: $(VENV)/.dev ## regenerate the Python code of the protos
	@PYTHON=$(abspath $(BIN)/python) proto/generate.sh

baseline: $(VENV)/.dev ## at a release: take today's protos as what buf breaking compares with
	cd proto && ../$(BIN)/buf build -o baseline.binpb

lock: ## renew both lock files (needs uv)
	uv lock --upgrade
	uv export -q --all-packages --no-emit-workspace --no-header --no-default-groups --group build -o requirements.lock
	uv export -q --all-packages --no-emit-workspace --no-header --all-groups -o requirements-dev.lock

verify: $(VENV)/.dev ## check that the committed generated code is what the protos give
	@generated=$$(mktemp -d) && trap 'rm -rf "$$generated"' EXIT && \
	PYTHON=$(abspath $(BIN)/python) proto/generate.sh "$$generated" && \
	diff -r --exclude=__pycache__ --exclude='llmpilot_*' proto/src "$$generated" && echo "generated code is up to date" || \
	{ echo "the generated code differs from the protos: run make proto"; exit 1; }

bench: $(VENV)/.dev ## run the benchmarks; each prints its table
	@for benchmark in benchmarks/*.py; do echo "== $$benchmark"; $(BIN)/python $$benchmark || exit 1; done

ci: lint types verify test ## what CI runs

clean: ## remove the environment and every cache
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
