# The commands of the README. Every target but `gpu` and `tune` sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUDGET ?= 540
STAGE ?=
RESULTS ?=
GPU_RUN = --budget $(BUDGET) --stage "$(STAGE)" $(if $(RESULTS),--results "$(RESULTS)")
export OMP_NUM_THREADS ?= 1

# LONG=--long: the tests as well for which another stands in `make test`.
LONG ?=
INTERPRETED := TRITON_INTERPRET=1 $(BIN)/pytest -q --durations=5 $(LONG)
COMPILED := TRITON_INTERPRET=0 $(BIN)/pytest -q
# Tests among torch's tools (opcheck, torch.compile, export, processes), and all others but those of compiled code.
OPS_GRAPHS = $(wildcard tests/ops/*/test_graphs*.py)
GRAPHS = tests/integration $(OPS_GRAPHS)
NOT_GRAPHS := tests --ignore=tests/kernels/aot --ignore=tests/integration --ignore-glob='*/test_graphs*.py'

.PHONY: setup demo doctor test test-all test-fast test-kernels test-graphs test-emulated test-compiled test-cpu test-matrix lint bench kernel-report predict roofline gpu gpu-env gpu-rehearse warm-cache tune figures docs

$(VENV)/.ready: setup.py constraints-ci.txt
	@$(PYTHON) -c 'import sys; sys.exit("fastseg needs Python 3.11 or later, this is %s; set PYTHON=" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints-ci.txt -e '.[dev]'
	@touch $@

setup: $(VENV)/.ready

demo: setup
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/fastseg demo

doctor: setup
	$(BIN)/fastseg doctor

# Two chains side by side, one a core; each pytest process is of its own kind (tests/conftest.py says why).
test: setup lint
	$(MAKE) -j2 --no-print-directory test-kernels-and-converting test-compiled-and-cpu

# Everything, long forms included.
test-all:
	$(MAKE) --no-print-directory test LONG=--long

# One family of ops in a minute: FAMILY is a folder of tests/ops.
FAMILY ?= pooling
test-fast: setup
	@test -d tests/ops/$(FAMILY) || { echo 'FAMILY=$(FAMILY): use one of' $(notdir $(patsubst %/,%,$(wildcard tests/ops/*/))); exit 2; }
	$(INTERPRETED) tests/ops/$(FAMILY) tests/test_architecture.py --ignore-glob='*/test_graphs*.py'

test-kernels: setup
	$(INTERPRETED) $(NOT_GRAPHS)
	$(INTERPRETED) $(OPS_GRAPHS)

# Of `test-kernels` by kind; in the other chain, which is as long with it.
test-graphs: setup
	$(INTERPRETED) tests/integration

.PHONY: test-kernels-and-converting test-compiled-and-cpu
test-kernels-and-converting: setup
	$(MAKE) --no-print-directory test-kernels
	$(MAKE) --no-print-directory test-converting

test-compiled-and-cpu: setup
	$(MAKE) --no-print-directory test-compiled
	$(MAKE) --no-print-directory test-graphs
	$(MAKE) --no-print-directory test-cpu
	$(MAKE) --no-print-directory test-emulated EMULATED='tests/ops -k "(every_order and aspp) or (half and bfloat16) or duplicates"'

test-compiled: setup
	$(COMPILED) $(LONG) tests/kernels/aot

test-cpu: setup
	$(COMPILED) $(LONG) $(GRAPHS)
	$(COMPILED) benchmarks --benchmark-disable $(if $(LONG),--full)

# The second checker executes the compiled TTIR on an emulated device; optional: a young package with pins of its own.
EMULATED ?= tests/ops
READY ?= setup
test-emulated: $(READY)
	@if $(BIN)/python -c 'import ttsem' 2>/dev/null || $(BIN)/pip install -q --disable-pip-version-check --no-deps --ignore-requires-python ttsem==0.1.0; \
	then TRITON_INTERPRET=0 $(BIN)/python -m ttsem.sanitize pytest -q -m 'not gpu' $(EMULATED); \
	else echo 'ttsem does not install here: the second checker is skipped'; fi

# Conversion and losses beside the libraries themselves, which lie in an environment of their own, on top of .venv: torch
# stays that of .venv.
CONVERT_ENV := .venv-convert
BESIDE = import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))
$(CONVERT_ENV)/.ready: setup.py constraints-ci.txt
	$(BIN)/python -m venv $(CONVERT_ENV)
	$(BIN)/python -c '$(BESIDE)' > $$($(CONVERT_ENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth
	$(CONVERT_ENV)/bin/pip install -q --disable-pip-version-check --no-compile -c constraints-ci.txt 'fastseg-kernels[convert-test]'
	@touch $@

.PHONY: test-converting
test-converting: setup
	@if $(MAKE) --no-print-directory $(CONVERT_ENV)/.ready; \
	then TRITON_INTERPRET=0 $(CONVERT_ENV)/bin/python -m pytest -q $(LONG) tests/converting tests/losses/test_libraries*.py; \
	else echo 'convert-test does not install here: conversion beside the libraries is skipped'; fi

# All of `make test` but the lint, on the oldest and on the newest supported versions: 10 GB of environments.
PYTHON312 ?= python3.12
PYTHON313 ?= python3.13
MATRIX_ENV = sed '/^torch==/d; /^triton==/d' constraints-ci.txt > $(1)/constraints.txt && \
	PIP_CONSTRAINT=$(1)/constraints.txt $(1)/bin/pip install -q --disable-pip-version-check $(2) -e '.[dev]' && touch $(1)/.ready
.PHONY: test-matrix-oldest test-matrix-newest
test-matrix: test-matrix-oldest test-matrix-newest

# The second checker needs Triton 3.7.
test-matrix-oldest:
	$(PYTHON312) -m venv .venv-oldest
	$(call MATRIX_ENV,.venv-oldest,torch==2.11.0 triton==3.6.0)
	$(MAKE) --no-print-directory VENV=.venv-oldest -j2 test-kernels test-compiled test-graphs test-cpu

test-matrix-newest:
	$(PYTHON313) -m venv .venv-newest
	$(call MATRIX_ENV,.venv-newest,torch==2.15.0 triton==3.9.0)
	$(MAKE) --no-print-directory VENV=.venv-newest -j2 test-kernels test-compiled-and-cpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	TRITON_INTERPRET=0 $(BIN)/pytest benchmarks

kernel-report: setup
	TRITON_INTERPRET=0 $(BIN)/python -P -m fastseg.kernels.tools.report

# Times by a static model of the compiled code: docs/predicted.md, of the cases whose code has changed; SECONDS=600 of it.
# TUNE=1: configurations, into kernels/tuned. Minutes.
TUNE ?=
SECONDS ?=
predict: setup
	TRITON_INTERPRET=0 $(BIN)/python -P -m fastseg.kernels.tools.predict $(if $(TUNE),--tune) $(if $(SECONDS),--seconds $(SECONDS))

roofline: setup
	$(BIN)/python -m benchmarks.roofline

# On a machine with a CUDA GPU, its own torch and Triton, and no network: nothing is downloaded.
gpu:
	$(PYTHON) -m pip install -q --no-deps --no-build-isolation -e .
	$(PYTHON) -m benchmarks.gpu $(GPU_RUN)

tune:
	$(PYTHON) -m benchmarks.gpu --stage tune --budget $(BUDGET) $(if $(RESULTS),--results "$(RESULTS)")

# The GPU machine's versions, without a GPU: 5 GB, for a rehearsal and for compiling ahead. docs/gpu.md says more.
GPU_ENV := .venv-gpu
$(GPU_ENV)/.ready:
	python3.12 -m venv $(GPU_ENV)
	$(GPU_ENV)/bin/pip install -q --disable-pip-version-check torch==2.11.0 triton==3.6.0 numpy==2.3.5 setuptools pillow scikit-image 'pytest>=8' pytest-benchmark pytest-xdist
	$(GPU_ENV)/bin/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

gpu-env: $(GPU_ENV)/.ready

gpu-rehearse: gpu-env
	$(GPU_ENV)/bin/python -m benchmarks.gpu --rehearse $(GPU_RUN)

# What tests launch under the interpreter (minutes), then what the benchmarks launch; compiled for WARM seconds.
WARM ?= 1800
warm-cache: setup gpu-env
	mkdir -p .triton-cache
	TRITON_INTERPRET=1 PYTHONPATH=$(CURDIR) $(BIN)/pytest -q -p benchmarks.gpu.warm_cache --signatures=$(CURDIR)/.triton-cache/signatures.pickle tests/ops tests/nn tests/models
	$(GPU_ENV)/bin/python -m benchmarks.gpu.warm_cache --seconds $(WARM)

# Compiles every kernel for one chip: minutes.
docs: setup
	TRITON_INTERPRET=0 $(BIN)/python -m benchmarks.report.pages --without-report

figures: setup
	$(BIN)/python -m benchmarks.report.plot
