# Everything a developer does. A fresh machine needs only make and Python >= 3.10 with its venv module.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOOLS := $(VENV)/tools
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
SOURCES := vrscope tests tools $(wildcard benchmarks notebooks)

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-tools lint format types layers readme reports bench bench-full constraints check clean

help:  ## say what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /: /' | awk -F': ' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(VENV)/.installed  ## the whole job on the model that comes with vrscope; prints where the report is
	$(BIN)/vrscope demo --force
	@echo "The report: $(CURDIR)/vrscope-demo/report.html"

test: $(VENV)/.test  ## the tests, without those that take minutes
	$(PYTEST) -n $(JOBS) --dist loadfile -m "not slow"

test-full: $(VENV)/.test  ## all tests
	$(PYTEST) -n $(JOBS) --dist loadfile

test-tools: $(VENV)/.tools  ## the recipes in llm-compressor and torchao, which other tests skip
	PYTHONPATH=$(TOOLS) $(BIN)/python -c 'import llmcompressor, torchao'
	PYTHONPATH=$(TOOLS) $(PYTEST) tests/test_fragility_targets.py -k "llm_compressor or torchao"

lint: $(VENV)/.dev  ## formatting, style, and whether the README's tables are fresh
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/python tools/readme_tables.py --check

format: $(VENV)/.dev  ## put the sources in order
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

types: $(VENV)/.dev  ## the type checker
	$(BIN)/mypy

layers: $(VENV)/.dev  ## whether imports point downward only
	$(BIN)/lint-imports

check: lint types layers test  ## all of the above

readme: $(VENV)/.installed  ## write the README's tables again
	$(BIN)/python tools/readme_tables.py

reports: $(VENV)/.test  ## make the demo's report and its picture again
	$(BIN)/vrscope demo -o vrscope-demo --force
	mkdir -p reports/demo
	cp vrscope-demo/report.html vrscope-demo/results.json reports/demo/
	$(BIN)/python tools/screenshot.py reports/demo/report.html reports/demo.png

bench: $(VENV)/.test  ## the benchmarks: damage by rescale on the included model, speed and memory on 1 GB
	$(BIN)/python benchmarks/rescales.py vrscope/demo/model --tokens 1024
	$(BIN)/python benchmarks/speed.py --gb 1

bench-full: $(VENV)/.test  ## speed and memory on 1, 4 and 16 GB, into the README; LENS=PATH adds weightlens; up to an hour
	$(BIN)/python benchmarks/speed.py $(if $(LENS),--lens $(LENS)) -o benchmarks/results/speed.md
	$(BIN)/python tools/readme_tables.py

constraints: $(VENV)/.dev $(VENV)/.test  ## write constraints.txt from what is installed
	$(BIN)/python tools/constraints.py > constraints.new && mv constraints.new constraints.txt

clean:  ## remove what make made
	rm -rf $(VENV) vrscope-demo build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment, one stamp for each set of packages, so that nothing is installed twice.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "vrscope needs Python 3.10 or newer; '$(PYTHON)' is older or missing. Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "'$(PYTHON)' cannot make a virtual environment; install its venv module." >&2; exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV); the first time takes some minutes"
	$(INSTALL) -e .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV); the first time takes some minutes"
	$(INSTALL) -e '.[test]'
	@touch $@ $(VENV)/.installed

# Without what they depend on: llmcompressor asks for older releases of transformers and compressed-tensors than ours,
# but works with these. Outside the environment, so that nothing else sees them.
$(VENV)/.tools: $(VENV)/.test
	$(INSTALL) --no-deps --target $(TOOLS) --upgrade llmcompressor==0.14.0.1 torchao==0.18.0 \
	  auto-round datasets dill loguru multiprocess nvidia-ml-py pyarrow xxhash
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed
