# Each target does the set-up that it needs. PYTHON=… chooses the interpreter of a new environment,
# VENV=… the environment, EXTRA=cuda12|cuda13|tpu the accelerator, ARGS=… is handed to the command.
VENV ?= .venv
EXTRA ?=
ARGS ?=
comma := ,
export PYTHON

.PHONY: help serve test check setup setup-dev clean
.DEFAULT_GOAL := help

help:
	@echo "make serve   serve the demo model at http://127.0.0.1:8000"
	@echo "             make serve ARGS='path/to/hf-folder --port 9000' serves another; ARGS=--help lists the flags"
	@echo "make test    run the tests                  (ARGS='tests/host -k planner')"
	@echo "make check   ruff, pyright, layer contracts, architecture test"
	@echo "make clean   remove the environments and the caches of the tools"
	@echo "Set-up happens by itself, once. Choose with PYTHON=python3.12, VENV=.venv, EXTRA=cuda12|cuda13|tpu"

setup:
	@scripts/setup_venv $(VENV) "$(EXTRA)"

setup-dev:
	@scripts/setup_venv $(VENV) "dev$(if $(EXTRA),$(comma)$(EXTRA))"

serve: setup
	@exec $(VENV)/bin/python -m jaxserve.serve $(ARGS)

test: setup-dev
	@exec $(VENV)/bin/python -m pytest $(ARGS)

check: setup-dev
	@VENV=$(VENV) scripts/check

clean:
	rm -rf .venv .venv-newest .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
