# Everything here runs in an environment of its own, .venv, made when it is first needed and again when the lock changes.
# It takes Debian 12 with git, make and python3.11-venv; no compiler and no GPU.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Test processes; each loads PyTorch, so more than four want more memory than they save time.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
# More arguments for pytest: make test ARGS="tests/runtime -k noise"
ARGS ?=

# The repository's root holds a folder `kernels`, the name of another package: keep the current folder off sys.path.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

# An environment is as good as what it was made from: its marker's name carries a digest of that. Files' times would not
# do, since a checkout of another branch changes them without changing a byte. The folder counts, for scripts name it.
digest = $(shell { cat $(1); echo '$(2)'; } | sha256sum | cut -c1-16)
DEPENDENCIES := $(VENV)/.dependencies-$(call digest,requirements.lock,$(CURDIR) $(shell $(PYTHON) --version 2>/dev/null))
SOURCES := pyproject.toml $(wildcard setup.py csrc/*.* csrc/*/*.*)
READY := $(VENV)/.ready-$(call digest,$(SOURCES),$(notdir $(DEPENDENCIES)))

PYTEST := $(BIN)/python -m pytest
CLANG_SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu csrc/*.cuh csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)
# The GPU suite is a program of its own, for another machine.
BENCHES := $(filter-out bench/gpu_suite.py,$(sort $(wildcard bench/*.py)))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow test-gpu coverage kernels-check bench lint lint-ruff lint-format lint-types lint-cpp
.PHONY: format env lock wheel clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(READY) ## build the bundled model's engine, draw the contact sheet, measure it against diffusers
	$(BIN)/python -m heatsink.demo

test: $(READY) ## the tests, without those marked slow or gpu
	@echo "Left out by default: tests marked slow (minutes or gigabytes: make test-slow) and gpu (a CUDA device: make test-gpu)."
	OMP_NUM_THREADS=1 $(PYTEST) -n $(JOBS) --dist loadfile --benchmark-disable $(ARGS)

test-slow: $(READY) ## the tests marked slow
	$(PYTEST) -m "slow and not gpu" --benchmark-disable $(ARGS)

test-gpu: $(READY) ## the tests marked gpu, on a machine with a CUDA device
	$(PYTEST) -m gpu --benchmark-disable $(ARGS)

coverage: $(READY) ## the tests, and the lines they never reach
	OMP_NUM_THREADS=1 $(PYTEST) -n $(JOBS) --dist loadfile --benchmark-disable --cov --cov-report=term-missing:skip-covered $(ARGS)

kernels-check: $(READY) ## every case and configuration of every kernel, compiled for every architecture
	$(BIN)/python -m heatsink.cli kernels check --all --space --record .work/kernels.json $(ARGS)

bench: $(READY) ## the measurements of bench/, on the engine that make demo built
	$(if $(BENCHES),,@echo "bench/ holds no measurement yet"; exit 1)
	@set -e; for script in $(BENCHES); do echo "== $$script"; $(BIN)/python $$script; done

lint: lint-ruff lint-format lint-types lint-cpp ## ruff, mypy, clang-format: what CI checks (make -k lint: all of them)

lint-ruff: $(READY)
	$(BIN)/ruff check .

lint-format: $(READY)
	$(BIN)/ruff format --check .

lint-types: $(READY)
	$(BIN)/mypy

lint-cpp: $(READY)
	$(if $(CLANG_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CLANG_SOURCES),@:)

format: $(READY) ## rewrite the sources in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CLANG_SOURCES),$(BIN)/clang-format -i $(CLANG_SOURCES))

env: $(READY) ## the environment alone

wheel: $(READY) ## a wheel under dist/
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps -w dist .

lock: ## resolve the dependencies anew and write requirements.lock
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install "$$(grep '^torch==' requirements.lock)" setuptools wheel
	HEATSINK_NO_EXT=1 .venv-lock/bin/python -m pip install --no-build-isolation \
		"$$(grep '^torch==' requirements.lock)" -e ".[dev]"
	{ grep '^#' requirements.lock; \
		.venv-lock/bin/python -m pip freeze --all --exclude pip --exclude-editable | sed 's/+cpu$$//'; } > requirements.new
	mv requirements.new requirements.lock
	rm -rf .venv-lock

clean: ## what was built and written, and the caches
	rm -rf build dist out *.egg-info heatsink/_C*.so .coverage .coverage.*
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## the environment too
	rm -rf $(VENV)

$(DEPENDENCIES):
	@command -v $(PYTHON) >/dev/null || { \
		echo "There is no $(PYTHON). On Debian 12: apt install python3.11-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Heatsink needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Name a newer one: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) can't make environments. On Debian 12: apt install python3.11-venv"; exit 1; }
	@echo "Making $(VENV) and installing what requirements.lock lists (about 700 MB with a CPU build of PyTorch, some minutes) ..."
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -r requirements.lock
	@touch $@

# Into the environment that the lock made: nothing is resolved or downloaded here.
$(READY): $(DEPENDENCIES)
	@echo "Installing heatsink itself (the C++ extension where a compiler is; without one PyTorch does its work) ..."
	@rm -f heatsink/_C*.so $(VENV)/.ready-*
	$(BIN)/python -m pip install --no-build-isolation --no-deps -e .
	@touch $@
