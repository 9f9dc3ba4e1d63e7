# `make quickstart` and `make test` need python3 (3.11 to 3.13) with venv, and make; nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CODE := main.py launcher_scripts src tests benchmarks
export PYTHONPATH := src

.PHONY: help quickstart test test-long lint types format clean

help:
	@echo "make quickstart  install, train a tiny GPT and two adapters on it, show the table"
	@echo "make test        all tests but the long ones"
	@echo "make test-long   the long ones"
	@echo "make lint types  ruff and pyright"
	@echo "make format      let ruff rewrite"
	@echo "make clean       remove the environment and what runs left in results/"

quickstart: $(VENV)/.runtime
	$(BIN)/python main.py experiment=quickstart

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not long"

test-long: $(VENV)/.dev
	$(BIN)/python -m pytest -m long

lint: $(VENV)/.dev
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

clean:
	rm -rf $(VENV) results

$(VENV)/.runtime: requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	touch $@
