# Everything starts here. Each target does its own set-up: it needs Python 3.11 or later, pip and make, nothing else.
#
#   PYTHON=python3.12         the interpreter to make the environments with
#   TORCH_INDEX=URL           an extra package index for torch, e.g. one that serves CPU-only or other CUDA builds
#   JOBS=4                    parallel test processes (each uses one thread)
#   ARGS="..."                more arguments for pytest or for the program that a target runs

PYTHON      ?= python3
TORCH_INDEX ?=
JOBS        ?= 2
ARGS        ?=
OUT         ?= runs/quickstart
SEED        ?= 0
MODEL       ?= $(OUT)/run/sft/final

VENV   := .venv
LOWEST := .venv-lowest
BIN    := $(VENV)/bin
DEV    := '.[quickstart,serve,data,deepspeed,bnb,bench,preference,dev]'
INSTALL = -m pip install --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PYTEST  = -m pytest -n $(JOBS) --dist loadfile

# DeepSpeed is installed without compiling anything: mllm needs none of its C++.
export DS_BUILD_OPS := 0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup quickstart quickstart-seeds quickstart-media demo test test-all test-gpu test-lowest check format pins clean

help: ## Show this list
	@echo "mllm: build, tune, shrink, serve and export multimodal language models"
	@echo
	@echo "New here?  make quickstart   trains, evaluates and exports a small model on two CPU cores, in minutes"
	@echo "           make demo         then chat with it in the browser"
	@echo "Changing?  make test check   what CI runs"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-24s %s\n", $$1, $$2 }'
	@echo
	@sed -n 's/^#   \([A-Z_]*=.*\)/  \1/p' $(MAKEFILE_LIST)

# --- environments: remade only when what they install changes -----------------------------------------------------------

setup: $(VENV)/dev ## Install mllm and every development tool into .venv

define make_venv
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d, and mllm \
	needs 3.11 or later. Do this: make PYTHON=/path/to/python3.11 ..." % v)'
	$(PYTHON) -m venv $(1)
endef

$(BIN)/python:
	$(call make_venv,$(VENV))

$(VENV)/run: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(INSTALL) --editable '.[quickstart,serve,data]'
	@touch $@

$(VENV)/dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(INSTALL) --editable $(DEV)
	@touch $@ $(VENV)/run

$(LOWEST)/dev: pyproject.toml constraints.txt constraints-lowest.txt
	$(call make_venv,$(LOWEST))
	$(LOWEST)/bin/python $(INSTALL) --editable $(DEV)
	$(LOWEST)/bin/python -m pip install --requirement constraints-lowest.txt
	$(LOWEST)/bin/python -m pip check
	@touch $@

# --- programs ----------------------------------------------------------------------------------------------------------

quickstart: $(VENV)/run ## From handwriting to a trained, aligned, pruned, chatting, exported model (OUT=, SEED=)
	$(BIN)/python scripts/quickstart.py --out $(OUT) --seed $(SEED) $(ARGS)

quickstart-seeds: $(VENV)/run ## The quickstart with seeds 0, 1 and 2, each held to its thresholds
	for seed in 0 1 2; do \
		$(BIN)/python scripts/quickstart.py --out $(OUT)-seed$$seed --seed $$seed --strict $(ARGS) || exit 1; \
	done

quickstart-media: $(VENV)/run ## The same with videos and sounds (OUT=, SEED=)
	$(BIN)/python scripts/quickstart.py --out $(OUT)-media --seed $(SEED) --modalities image,audio,video $(ARGS)

demo: $(VENV)/run ## Chat with the quickstart's model in the browser (MODEL=, ARGS="--pruner visiondrop tokens=3")
	@test -e $(MODEL) || { echo "There is no model at $(MODEL). Do this: make quickstart, or make demo MODEL=DIR"; exit 1; }
	$(BIN)/python serve/demo.py --model $(MODEL) $(ARGS)

# --- tests and checks --------------------------------------------------------------------------------------------------

test: $(VENV)/dev ## The fast tests: no network, no GPU, minutes on two cores
	$(BIN)/python $(PYTEST) $(ARGS)

test-all: $(VENV)/dev ## The fast and the slow tests
	$(BIN)/python $(PYTEST) -m "not gpu and not network" $(ARGS)

test-gpu: $(VENV)/dev ## The tests that need a CUDA device, one at a time
	$(BIN)/python -m pytest -m "gpu and not network" $(ARGS)

test-lowest: $(LOWEST)/dev ## The fast tests on the oldest supported transformers, peft and accelerate
	$(LOWEST)/bin/python $(PYTEST) $(ARGS)

check: $(VENV)/dev ## Format, lint, types, import direction
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/dev ## Format the code and fix what lint can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

pins: ## Refresh constraints.txt from the newest releases (torch keeps its pin), for a maintainer to review
	rm -rf .venv-pins && $(PYTHON) -m venv .venv-pins
	.venv-pins/bin/python -m pip install "$$(grep '^torch==' constraints.txt)" --editable $(DEV)
	.venv-pins/bin/python -m pip freeze --exclude-editable | sed 's/+.*//' > .venv-pins/pins.txt
	sed '/^[^#]/d' constraints.txt > .venv-pins/header.txt
	cat .venv-pins/header.txt .venv-pins/pins.txt > constraints.txt
	rm -rf .venv-pins

clean: ## Remove environments and caches; trained models in runs/ stay
	rm -rf $(VENV) $(LOWEST) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
