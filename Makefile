# The two commands of the README are `make train` and `make test`; each makes the virtual environment when it is missing.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= train
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: help train test test-slow timm-suite lint format bench clean

help:  ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(STAMP): pyproject.toml setup.py constraints.txt tools/install.sh
	PYTHON=$(PYTHON) VENV=$(VENV) EXTRAS=$(EXTRAS) sh tools/install.sh
	@touch $@

train: $(STAMP)  ## train Vision Mamba on the bundled Fashion-MNIST subset and show its predictions (minutes on a CPU)
	$(RUN) -m sinuous train experiment=vision/fashion_mnist

test: $(STAMP)  ## all tests that need no GPU, the Triton kernels under the interpreter and timm's own suite included
	-$(RUN) tools/fetch_timm_tests.py
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "not slow and not interpret"
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(RUN) -m pytest -n 2 -m interpret tests/kernels

test-slow: $(STAMP)  ## the tests that are left out of `make test` because they take long
	$(RUN) -m pytest -m slow

timm-suite: $(STAMP)  ## timm's own tests on every vision model, full sizes (half an hour)
	-$(RUN) tools/fetch_timm_tests.py
	SINUOUS_TIMM_MODELS=all $(RUN) -m pytest tests/timm_suite -m timm_suite

lint: $(STAMP)  ## ruff, mypy and the floors of the house
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) tools/typecheck_view.py
	MYPYPATH=typecheck_view $(RUN) -m mypy -p sinuous
	PYTHONPATH=typecheck_view $(VENV)/bin/lint-imports --no-logo

format: $(STAMP)  ## let ruff mend what it can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(STAMP)  ## time the ops and the backbones against the peers that are installed
	PYTHON=$(PYTHON) VENV=$(VENV) EXTRAS=$(EXTRAS) sh tools/install.sh dev bench
	$(RUN) -m sinuous bench ops
	$(RUN) -m sinuous bench backbones

clean:  ## remove what was built; runs under outputs/ stay
	rm -rf build dist typecheck_view .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache src/*.egg-info
