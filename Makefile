# On a fresh machine: `make quickstart` or `make test`. Both create .venv and install what they need on the first run.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
# The tested version of everything that is installed. `make test CONSTRAINTS=` installs whatever is newest.
CONSTRAINTS ?= constraints.txt

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
PINS := $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
NEWEST := VENV=$(VENV)-newest CONSTRAINTS= TORCH_VERSION=newest
# One thread per process: the tests run several processes, and tiny models only lose time to more threads.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-newest quickstart-newest test-slow test-gpu compat speed constraints quality style clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "%-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Stamp files: an installed environment is left alone until pyproject.toml or the tested versions change.
$(VENV)/.stamp-torch: scripts/install_torch.sh
	@test -x $(PY) || { echo "Creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@sh scripts/install_torch.sh $(PY)
	@touch $@

$(VENV)/.stamp-quickstart: pyproject.toml $(CONSTRAINTS) $(VENV)/.stamp-torch
	@echo "Installing hf_linattn and the recipes' requirements into $(VENV)"
	@$(PIP) install --quiet $(PINS) --editable '.[quickstart]'
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml $(CONSTRAINTS) $(VENV)/.stamp-torch
	@echo "Installing hf_linattn and the test requirements into $(VENV)"
	@$(PIP) install --quiet $(PINS) --editable '.[dev]'
	@touch $@ $(VENV)/.stamp-quickstart

quickstart: $(VENV)/.stamp-quickstart  ## swap, fine-tune, evaluate, save, push and reload MiniLM (a few minutes, no Hub)
	@$(PY) recipes/quickstart.py

test: $(VENV)/.stamp-dev  ## all tests that need no GPU and are not slow
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not slow and not gpu"

test-newest:  ## the same tests in an environment of its own, with the newest release of everything
	@rm -rf $(VENV)-newest
	@$(MAKE) test $(NEWEST)

quickstart-newest:  ## the quickstart in that environment
	@$(MAKE) quickstart $(NEWEST)

test-slow: $(VENV)/.stamp-dev  ## the slow tests
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "slow and not gpu"

test-gpu: $(VENV)/.stamp-dev  ## the tests that need a CUDA device
	$(PYTEST) -m gpu

compat: $(VENV)/.stamp-dev  ## the tests marked compat on every supported release of Transformers, and their table
	$(PY) -m nox

BEFORE ?= HEAD

speed: $(VENV)/.stamp-dev  ## compare the speed of this checkout with that of the revision BEFORE (at most 15 minutes)
	$(PY) experiments/quick.py --before $(BEFORE)

constraints: $(VENV)/.stamp-dev  ## write constraints.txt anew: the newest releases of everything but torch
	@$(PIP) install --quiet uv
	$(PY) scripts/make_constraints.py

quality: $(VENV)/.stamp-dev  ## lint, format and type checks
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

style: $(VENV)/.stamp-dev  ## fix what the formatter and linter can fix
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:  ## remove the environment, caches and outputs of the quickstart
	rm -rf $(VENV) $(VENV)-newest .nox .pytest_cache .ruff_cache .mypy_cache build dist quickstart runs *.egg-info
