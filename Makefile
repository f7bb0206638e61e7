# SPDX-License-Identifier: Apache-2.0
# make demo   create the environment, build, quantize and evaluate the built-in models
# make study  the full grids of widths and methods on the built-in models; a table in out/study
# make test   lint, types, native tests, Python tests; with nvcc the CUDA kernels on the interpreter
# make emoji  fetch emoji from the npm registry and make a retrieval set of them
# make test-gpu   the CUDA tests on this machine's GPU; their times go to out/test-gpu.xml
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUT ?= out
# All that a wheel has, so that the tests run and judge what ships. With 80,90,100 only, one of each
# family of PTX, the build takes three quarters of the time.
CUDA_ARCHS ?= 80,86,89,90,100,120
# auto (with nvcc on the PATH), on or off: the CUDA library, and with it its tests
export MMQ_CUDA ?= auto
CUDA := $(if $(filter off,$(MMQ_CUDA)),,$(shell command -v nvcc))
GPU_TESTS = $(addprefix tests/test_,$(addsuffix .py,packing packed_gemm gptq_block awq_errors linear \
  cuda_pack cuda_repack cuda_packed_gemm cuda_gptq_block cuda_awq_errors cuda_errors cuda_models \
  cuda_device))
comma := ,
BIN = $(VENV)/bin
NATIVE_FLAGS = -S . -G Ninja -DMMQ_PYTHON=OFF -DMMQ_TESTS=ON

export CMAKE_BUILD_PARALLEL_LEVEL ?= 2
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo study test test-gpu env build lint types native sanitize unit bench bench-plot eval-table \
  allocate-table emoji wheel wheel-check lines clean

demo: build
	$(BIN)/mmq demo --out $(OUT)/demo

# Goes on where it was stopped; what is done is not done again.
study: build
	$(BIN)/mmq sweep tiny-study --out $(OUT)/study --workers $(or $(WORKERS),2) --threads 1

test: lint types native unit lines

env: $(VENV)/.ready

# torch first and pinned: a looser pin may resolve to a build with several GB of CUDA packages.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" setuptools cmake ninja pybind11
	MMQ_CUDA_ARCHS="$(CUDA_ARCHS)" $(BIN)/pip install --quiet --disable-pip-version-check \
	  --no-build-isolation -e ".[dev]"
	touch $@

# The editable install builds once; after that ninja rebuilds what changed.
build: env
	$(BIN)/cmake -S . -B build/dev -G Ninja --log-level=WARNING -DMMQ_PTXSIM=ON \
	  -DMMQ_CUDA=$(MMQ_CUDA) -DMMQ_CUDA_ARCHS="$(CUDA_ARCHS)" -DPython_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build build/dev --target all $(if $(CUDA),mmq_cuda_mutations)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' \
	  'tests/native/*' 'tests/ptxsim/*.h' 'tests/ptxsim/*.cpp' 'tests/ptxsim/*.cu')

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
	OMP_NUM_THREADS=1 MMQ_REQUIRE="$${MMQ_REQUIRE-ptxsim$(if $(CUDA),$(comma)cuda$(comma)mutations)}" $(BIN)/pytest

# The same tests with a real device in the interpreter's place; needs a torch that has CUDA.
test-gpu: build
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  MMQ_TEST_GPU=1 MMQ_REQUIRE=cuda $(BIN)/pytest -k cuda --durations=0 \
	    --junitxml=$(OUT)/test-gpu.xml $(GPU_TESTS); \
	else echo "test-gpu: skipped, this machine (or this torch) has no CUDA device"; fi

# A retrieval set with a held-out rendering, from packages of the npm registry: 157 MB, not shipped.
EMOJI_PACKAGES = emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 \
  @lobehub/fluent-emoji-3d@1.1.0 cldr-annotations-modern@45.0.0 \
  cldr-annotations-derived-modern@45.0.0

emoji: env
	mkdir -p $(OUT)/emoji-packages
	cd $(OUT)/emoji-packages && npm pack --silent $(EMOJI_PACKAGES)
	$(BIN)/python -m mmq_evals.data.emoji $(OUT)/emoji-packages $(OUT)/emoji

# The tiny models at full precision, 4 and 3 bits: intervals, flips, paired tests and KL as one table.
eval-table: build
	$(BIN)/python tests/quant_table.py --out $(OUT)/eval-table

# packed_gemm beside torch and other libraries, with met or short per cell. ggml is compiled for
# this machine, which takes some minutes once.
BENCH_PACKAGES = $(VENV)/.bench
$(BENCH_PACKAGES): pyproject.toml | env
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[bench]"
	$(BIN)/pip install --quiet --disable-pip-version-check "llama-cpp-python>=0.3.30" || \
	  echo "bench: ggml did not build and is left out"
	touch $@

# A run that was stopped goes on.
bench: build $(BENCH_PACKAGES)
	$(BIN)/python tests/bench/gemm_table.py --json $(OUT)/bench/gemm.json

bench-plot: build $(BENCH_PACKAGES)
	$(BIN)/python tests/bench/gemm_plot.py $(OUT)/bench/gemm.json $(OUT)/bench

# Allocated widths beside uniform ones at equal bytes on the tiny models: score and KL, paired.
allocate-table: build
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/allocate_table.py --out $(OUT)/allocate

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
