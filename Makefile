# The project's own commands. Everything happens inside this folder: `.venv` is created on the first call.

# A Python of your choice: make PYTHON=/path/to/python3.11 test
PYTHON ?=
# The one version that everybody gets. A GPU build or a CPU build of it is the package index's choice.
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help demo test check format bench clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP)  ## Start a small cluster, ask it in four ways, stop it
	$(BIN)/python examples/demo.py

test: $(STAMP)  ## Run the whole test suite
	$(BIN)/python -m pytest

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
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

# Candidates are run, not only looked up: a version manager may put names on PATH that have no Python behind them.
$(BIN)/python:
	@for candidate in $(or $(PYTHON),python3 python3.12 python3.11 python3.10); do \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' \
	      2>/dev/null; then \
	    echo "creating $(VENV) with $$candidate ($$("$$candidate" --version))"; \
	    exec "$$candidate" -m venv $(VENV); \
	  fi; \
	done; \
	echo "make: no fit Python: dynamo-llm needs 3.10, 3.11 or 3.12 with venv; name one by make PYTHON=/path/to/python" >&2; \
	exit 1

$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check '$(TORCH)' -e '.[worker,embedded,dev]'
	@touch $@
