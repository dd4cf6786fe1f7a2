# make env      the environment in .venv, made once and again when its inputs change
# make test     all tests              make lint    ruff and mypy
# make demo     the whole of megawrap on this machine, in minutes
# make scorecard the fault tests and their figures   make bench   training speed beside its peers
# make gpu      on a machine with a GPU: the tests that need one, then speed, memory and MFU beside the peers
#
# Every path below is relative, so that a checkout whose own path holds spaces works.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env test demo lint scorecard bench gpu clean

BIN := .venv/bin
STAMP := .venv/.ready

# The first interpreter that runs, is 3.11 or newer and can make environments; `make env PYTHON=...` chooses another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)
# Extra arguments for the tests: make test ARGS="tests/data -q"
ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

help:
	@sed -n '1,5s/^# //p' Makefile

env: $(STAMP)

# torch comes first and alone: where a CPU build is on offer it satisfies everything that follows.
$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "megawrap needs Python 3.11 or newer with venv and ensurepip; give it with: make env PYTHON=/path/to/python3" >&2; exit 2; fi
	rm -rf .venv
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,plots,fast,sentencepiece,parquet,zstd]'
	touch $(STAMP)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

demo: $(STAMP)
	$(BIN)/python recipes/demo.py --output .demo $(ARGS)

scorecard: $(STAMP)
	$(BIN)/python -m pytest -m 'fault and not gpu and not slurm' -q -s $(ARGS)

bench: $(STAMP)
	$(BIN)/python benchmarks/train.py $(ARGS)

gpu: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt accelerate trl
	$(BIN)/python -m pytest -m gpu -q
	$(BIN)/python benchmarks/train.py --device cuda $(ARGS)

clean:
	rm -rf .venv .demo
