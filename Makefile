# Every target does its own set-up, on a machine with Python >= 3.11, git and make.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
DEMO := runs/demo

.PHONY: help setup setup-tpu demo test test-slow lint lock clean

help:
	@echo "make demo       train, evaluate and sample a small GPT: minutes on 2 cores"
	@echo "make test       run the tests"
	@echo "make test-slow  run the long ones: whole models through the TPU compiler, convergence"
	@echo "make lint       ruff and pyright"
	@echo "make setup      only prepare $(VENV)"
	@echo "make setup-tpu  the same and libtpu, on a TPU VM"
	@echo "make lock       pin new versions (needs uv)"

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lmjax needs Python >= 3.11, this is $$($(PYTHON) --version); try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes -r requirements.lock
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready requirements-test.lock
	$(PIP) --require-hashes -r requirements-test.lock
	@touch $@

setup-tpu: $(VENV)/.ready
	$(PIP) --require-hashes -r requirements-tpu.lock

demo: setup
	$(RUN) -m lmjax train experiments/demo.py --workdir=$(DEMO)
	$(RUN) -m lmjax evaluate experiments/demo.py --workdir=$(DEMO) --split=test
	$(RUN) -m lmjax generate experiments/demo.py --workdir=$(DEMO) --prompt="The module" --top_k=40

test: $(VENV)/.ready-test
	$(RUN) -m pytest -n 2 -q

test-slow: $(VENV)/.ready-test
	$(RUN) -m pytest -n 2 -q -m slow

lint: $(VENV)/.ready-test
	$(PIP) -r requirements-dev.txt
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

lock:
	uv pip compile --quiet --universal --python-version=3.11 --generate-hashes --no-header \
		--no-emit-index-url requirements.txt -o requirements.lock
	uv pip compile --quiet --universal --python-version=3.11 --generate-hashes --no-header \
		--no-emit-index-url --extra=test pyproject.toml -c requirements.lock -o requirements-test.lock
	uv pip compile --quiet --universal --python-version=3.11 --generate-hashes --no-header \
		--no-emit-index-url --extra=tpu pyproject.toml -c requirements.lock -o requirements-tpu.lock

clean:
	rm -rf $(VENV) runs
