# SPDX-License-Identifier: Apache-2.0
# make demo   create the environment, build, quantize and evaluate the built-in models
# make test   lint, types, native tests, Python tests
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUT ?= out
BIN = $(VENV)/bin
NATIVE_FLAGS = -S . -G Ninja -DMMQ_PYTHON=OFF -DMMQ_TESTS=ON

export CMAKE_BUILD_PARALLEL_LEVEL ?= 2
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test env build lint types native sanitize unit bench wheel wheel-check lines clean

demo: build
	$(BIN)/mmq demo --out $(OUT)/demo

test: lint types native unit lines

env: $(VENV)/.ready

# torch first and pinned: a looser pin may resolve to a build with several GB of CUDA packages.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" setuptools cmake ninja pybind11
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[dev]"
	touch $@

# The editable install builds once; after that ninja rebuilds what changed.
build: env
	$(BIN)/cmake -S . -B build/dev -G Ninja --log-level=WARNING -DMMQ_PTXSIM=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build build/dev

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'tests/native/*' 'tests/ptxsim/*.h' 'tests/ptxsim/*.cpp' 'tests/ptxsim/*.cu')

types: env
	$(BIN)/mypy

native: env
	$(BIN)/cmake $(NATIVE_FLAGS) -B build/native
	$(BIN)/cmake --build build/native
	$(BIN)/ctest --test-dir build/native --output-on-failure

# AddressSanitizer with UndefinedBehaviorSanitizer, then ThreadSanitizer, on the native tests.
sanitize: env
	for kind in address,undefined thread; do \
	  $(BIN)/cmake $(NATIVE_FLAGS) -B build/sanitize-$$kind -DMMQ_SANITIZE=$$kind && \
	  $(BIN)/cmake --build build/sanitize-$$kind && \
	  $(BIN)/ctest --test-dir build/sanitize-$$kind --output-on-failure || exit 1; \
	done

# One thread: the shapes are small, and spinning threads crawl where other processes hold the cores. Tests of
# threads set their own number.
unit: build
	OMP_NUM_THREADS=1 $(BIN)/pytest

bench: build
	$(BIN)/pytest tests/bench --benchmark-only --benchmark-columns=median,iqr,rounds

wheel: env
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

# Installs the wheel into an empty environment per torch version and runs it there.
wheel-check: wheel
	$(PYTHON) tests/wheel_check.py --wheel dist/mmq-*.whl $(foreach t,$(TORCH),--torch "$(t)") --full

# The core's size, printed so that growth is noticed.
lines:
	@printf 'core lines: '; cat $$(git ls-files 'csrc/*' 'mmq_ext/*.py' 'mmq_ext/*.pyi' 'python/mmq/*.py') | wc -l

clean:
	rm -rf build dist $(VENV) *.egg-info mmq_ext/*.so
