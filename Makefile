# `make` lists the targets. Variables for the command line:
#   PYTHON=python3.12   the interpreter that .venv is made from (>= 3.11); `make clean` first to change it later
#   TORCH_INDEX=URL     a further package index, to choose a CPU or CUDA build of torch
#   WORKERS=3           processes that run the tests; more than cores, as they wait for files and for each other
#   SCALE=cpu           of the studies: smoke (seconds), cpu (hours) or gpu
#   JOBS=1              worker processes of the studies
#   DIST=dist           where `make wheel` writes

PYTHON ?= python3
TORCH_INDEX ?=
WORKERS ?= 3
SCALE ?= cpu
JOBS ?= 1
DIST ?= dist

VENV := .venv
BIN := $(VENV)/bin
MADE := $(VENV)/.made
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
# The package root is among them for the version it holds.
SPEC := pyproject.toml constraints.txt hybridfl/__init__.py
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	$(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") -c constraints.txt

# pip would compile to bytecode on one core, most of its time. Fails on files for later Pythons, as torch holds some.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two targets must never install into one environment at once.
.NOTPARALLEL:

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: install
install: $(RUN) ## Make .venv with what a run needs; again only when pyproject.toml or constraints.txt changed

.PHONY: train
train: $(RUN) ## Compare the default merging method with four baselines on the digits
	$(BIN)/hybridfl train -m baseline=none,fedavg,fedbuff,server_only,oracle

.PHONY: claims-digits
claims-digits: $(RUN) ## Repeat the study of Feddle on the digits
	$(BIN)/python scripts/feddle_digits.py

.PHONY: claims-fashion
claims-fashion: $(RUN) ## Repeat the study of Feddle on Fashion-MNIST
	$(BIN)/python scripts/feddle_fashion.py

.PHONY: table-feddle
table-feddle: $(RUN) ## Run what is missing of Feddle's study E1 to E10, SCALE=cpu (or smoke, gpu), and write docs/results/feddle.md
	$(BIN)/python scripts/table_feddle.py --scale $(SCALE) --jobs $(JOBS)

.PHONY: tune-feddle
tune-feddle: $(RUN) ## Tune Feddle and its rivals alike on the server's own examples, and write docs/results/feddle_tuning.md
	$(BIN)/python scripts/tune_feddle.py --scale $(SCALE) --jobs $(JOBS)

.PHONY: theory-feddle
theory-feddle: $(RUN) ## Look for the theory of Feddle in its runs on the digits: gradients, spans, variances, coefficients
	$(BIN)/python scripts/feddle_theory.py

.PHONY: test
test: $(DEV) ## Run all tests, WORKERS=3 processes at a time
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: check
check: $(DEV) ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.PHONY: format
format: $(DEV) ## Format the code and apply the safe lint fixes
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

.PHONY: bench
bench: $(RUN) ## Measure rounds against plain torch, the overhead, memory and start-up; on a quiet machine
	$(BIN)/python scripts/bench.py

.PHONY: bench-search
bench-search: $(RUN) ## Measure the search for coefficients against plain training, in time and memory
	$(BIN)/python scripts/bench_search.py

.PHONY: docs
docs: $(DOCS) ## Build the documentation into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -f scripts/docs/mkdocs.yml

.PHONY: wheel
wheel: $(DEV) ## Build the source archive, and the wheel from it, into DIST=dist
	$(BIN)/python -m build --outdir "$(DIST)"

.PHONY: clean
clean: ## Remove .venv, build products and caches; results in outputs/ stay
	rm -rf $(VENV) build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
	find . -path ./outputs -prune -o -path ./.git -prune -o \
		\( -name __pycache__ -o -name '*.egg-info' \) -type d -prune -exec rm -rf {} +

# An environment copied or moved along with the folder still points to where it was made: make it anew.
ifneq ($(shell cat $(MADE) 2>/dev/null),$(CURDIR))
$(MADE): moved
.PHONY: moved
moved: ;
endif

$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "hybridfl needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true);" \
			"name another with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' cannot make virtual environments: its modules venv and ensurepip are missing" \
			"(on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@printf '%s\n' '$(CURDIR)' > $@

# Runs need less than tests do, so the tools of `dev` are added only when a target asks for them.
$(RUN): $(MADE) $(SPEC)
	$(PIP_INSTALL) -e .
	@$(COMPILE)
	@touch $@

$(DEV): $(MADE) $(SPEC)
	$(PIP_INSTALL) -e '.[dev]'
	@$(COMPILE)
	@touch $(RUN) $@

$(DOCS): $(MADE) $(SPEC)
	$(PIP_INSTALL) -e '.[docs]'
	@$(COMPILE)
	@touch $(RUN) $@
