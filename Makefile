# make demo: a model cut over several ranks writes text.   make test: the CPU suite.
# Both make .venv first if it is not there; a second call installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SIDE_BY_SIDE := -n 2 --dist loadfile
DEMO_MODEL := examples/models/tpx-demo
PROMPT ?= \# pathlib

.PHONY: help demo check format test test-more soak mutants test-gpu clean

help:
	@grep -E '^# ' Makefile | cut -c3-; echo "targets: demo check format test test-more soak mutants test-gpu clean"

$(VENV)/.run: pyproject.toml constraints.txt scripts/setup.sh
	PYTHON=$(PYTHON) scripts/setup.sh $(VENV) run

$(VENV)/.dev: pyproject.toml constraints.txt scripts/setup.sh
	PYTHON=$(PYTHON) scripts/setup.sh $(VENV) dev

demo: $(VENV)/.run
	$(BIN)/tpx launch --tp-plan auto --model $(DEMO_MODEL) --prompt '$(PROMPT)' \
		--max-new-tokens 160 --temperature 0.6 --top-p 0.95 --seed 1

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(VENV)/.dev
	$(BIN)/pytest $(SIDE_BY_SIDE) -m "not more and not soak and not gpu"

test-more: $(VENV)/.dev
	$(BIN)/pytest $(SIDE_BY_SIDE) -m "more and not gpu"

soak: $(VENV)/.dev
	$(BIN)/pytest -m "soak and not gpu"

mutants: $(VENV)/.dev
	$(BIN)/python scripts/mutants.py

test-gpu: $(VENV)/.dev
	$(BIN)/pytest -m gpu tests/gpu kernels

clean:
	rm -rf $(VENV) build kernels/*/build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
