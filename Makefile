# Every target works from a fresh clone: `setup` makes .venv and is done at once when nothing changed.
PYTHON ?= python3
WORKERS ?= 2
MINUTES ?= 15
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLD_TRITON := $(VENV)/triton-3.6.0
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined

# Both names: pip reads the first for what it installs, and newer versions the second for isolated builds.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint gate sanitize bench clean

help:  ## print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(STAMP)  ## make .venv and install the package with its tests (quick when done)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; call make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

demo: setup  ## the main job on the embedded models: table, report.html (minutes the first time)
	$(BIN)/bwla-compile demo --html report.html

test: setup lint  ## lint, types and the test suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not exhaustive" --durations=30

test-all: setup lint  ## the same with the wider samples: every architecture, every combination
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: setup  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/mypy

gate: setup lint $(OLD_TRITON)  ## lint, every kernel against its reference, and the budgets of GPU kernels (no GPU needed)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/codegen tests/runtime tests/passes/test_expose_kernels.py \
	  tests/benchmarks/test_gpu.py
	PYTHONPATH=$(OLD_TRITON) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal \
	  tests/codegen/test_triton_gate.py tests/codegen/test_triton_aot.py

# GPU machines have this version: it compiles to other code than the newest, and is held to the same budgets.
$(OLD_TRITON): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==3.6.0
	@touch $@

sanitize: setup  ## the C++ kernels' tests under the address and undefined-behaviour sanitizers
	BWLA_CXX="g++ $(SANITIZERS) -fno-omit-frame-pointer -g1" ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest -q -n0 tests/codegen/test_kernels.py tests/codegen/test_attention.py

bench: setup  ## measure every kind within 15 minutes, and write the tables of README.md and docs/ anew
	-$(BIN)/python -m pip install --quiet 'matplotlib>=3.9'  # for the plots; the tables need nothing
	$(BIN)/python -m benchmarks all --minutes $(MINUTES)

clean:  ## remove what the targets made here (not the user's cache)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis report.html
