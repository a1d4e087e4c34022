# Every target does its own set-up, on a machine with Python >= 3.11, git and make.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := runs/demo

.PHONY: help setup demo test test-slow lint clean

help:
	@echo "make demo       train, evaluate and sample a small GPT (minutes on 2 cores)"
	@echo "make test       run the tests"
	@echo "make test-slow  run the long ones: TPU compilation, convergence"
	@echo "make lint       ruff and pyright"
	@echo "make setup      only prepare $(VENV)"

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lmjax needs Python >= 3.11; this is $$($(PYTHON) --version). Set PYTHON=…"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup
	$(RUN) -m lmjax train experiments/demo.py --workdir=$(DEMO)
	$(RUN) -m lmjax evaluate experiments/demo.py --workdir=$(DEMO) --split=test
	$(RUN) -m lmjax generate experiments/demo.py --workdir=$(DEMO) --prompt="The module" --top_k=40

test: setup
	$(RUN) -m pytest -n 2 -q

test-slow: setup
	$(RUN) -m pytest -n 2 -q -m slow

lint: setup
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

clean:
	rm -rf $(VENV) runs
