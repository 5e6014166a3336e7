# The doors: make demo, make test, make lint, make bench. Each installs what it needs into .venv.
PYTHON ?= python3
BIN := .venv/bin
# Pinned for development, so that a red test is ours; the package itself has no upper bounds.
TORCH := torch==2.13.0
LINTERS := clang-format==23.1.5 mypy==2.4.1 ruff==0.17.6 types-PyYAML
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Not isolated, so that what is compiled once stays compiled: the CUDA kernels take minutes where nvcc is there.
TOOLS := build cmake ninja pybind11 scikit-build-core
DEFINES := -Ccmake.define.FASTMERGE_WERROR=ON -Ccmake.define.FASTMERGE_CORE=ON
# Without a network: OFFLINE=1 makes do with what $(PYTHON) has, be that a virtual environment itself.
ifdef OFFLINE
PIP += --no-index --no-deps
TORCH := torch
TOOLS :=
SEEN := import site, sys; print(*site.getsitepackages(), sep="\n", file=open(sys.argv[1], "w"))
endif
# make CUDA_ARCHITECTURES=90 builds the kernels for one card, in a fraction of the time.
ifdef CUDA_ARCHITECTURES
DEFINES += -Ccmake.define.FASTMERGE_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)"
endif
BUILD = --no-build-isolation $(DEFINES)
CORE := CMakeLists.txt pyproject.toml $(shell find csrc -type f)
CPP := $(shell find csrc bench tests -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu')
PYTHONS := fastmerge kernels tests bench docs

.PHONY: demo test lint format docs wheel smoke neon soak bench gpu-test gpu-check gpu-sanitize gpu-bench clean

demo: .venv/built
	$(BIN)/fastmerge demo

test: .venv/built .venv/tests .venv-mergekit/built
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/tests .venv/linters
	$(BIN)/ruff check $(PYTHONS)
	$(BIN)/ruff format --check $(PYTHONS)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: .venv/linters
	$(BIN)/ruff check --fix $(PYTHONS)
	$(BIN)/ruff format $(PYTHONS)
	$(BIN)/clang-format -i $(CPP)

# The site, in build/docs; a warning is an error.
docs: .venv/docs
	$(BIN)/sphinx-build -E -W --keep-going --quiet -c docs . build/docs

# What is shipped, in dist: the sdist, and the wheel for this Python. Not of the sdist, which has the same files, so that
# what is compiled once stays compiled.
wheel: .venv/built
	rm -rf dist
	$(BIN)/python -m build --sdist --wheel --no-isolation $(DEFINES)

# That wheel where there is nothing else: no checkout, no compiler, no torch.
ALONE = env PATH=$(CURDIR)/build/alone/bin CC=/bin/false CXX=/bin/false
smoke: wheel
	rm -rf build/alone
	$(PYTHON) -m venv build/alone
	$(ALONE) python -m pip install --quiet --disable-pip-version-check --only-binary=:all: dist/*.whl
	$(ALONE) python -I tests/smoke.py
	$(ALONE) fastmerge demo

# Merges that are killed, go on and are compared to the last byte, until so many were.
KILLS ?= 250
soak: .venv/tests
	$(BIN)/python tests/soak.py --kills $(KILLS)

# The kernels of NEON, cross-compiled and under an emulator; a part of make test.
neon: .venv/tests
	$(BIN)/python -m pytest tests/test_neon.py $(ARGS)

# More hostile files and settings of the ops than make test tries, and others; what fails stays in tests/corpus. The
# second compiles the core with the sanitizers of addresses, undefined behaviour and threads, and the emulated GPU with the
# first of them, but for what throws on a fiber or runs nvcc; Python itself leaks.
EXAMPLES ?= 20000
fuzz: .venv/tests
	FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/test_fuzz.py -s $(ARGS)

sanitize: .venv/tests
	FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/test_sanitized.py -s $(ARGS)
	EMULATED_FLAGS="-O1 -g1 -fsanitize=address" ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		$(BIN)/python -m pytest tests/test_cuda.py tests/test_cuda_select.py -k 'not is_a_fault and not sm_' $(ARGS)

# make bench OP=merge CASE=mlp METHOD=ties runs one op on one case, PROVIDER=path.py with a provider of one's own beside
# ours, PARAMS=1.1e9 with models of that size on disk. Then the page of all that was ever measured here: bench/page/.
CHOSEN = $(if $(PROVIDER),--provider $(PROVIDER)) $(if $(OP),--op $(OP)) $(if $(CASE),--case $(CASE)) \
	$(if $(METHOD),--method $(METHOD)) $(if $(PARAMS),--params $(PARAMS))
bench: .venv/built .venv/tests .venv-mergekit/built
	$(BIN)/python -m pytest bench $(CHOSEN) --csv bench/history.csv $(ARGS)
	$(BIN)/python bench/page.py

# Where there is a GPU: the tests, then a few of them once more under compute-sanitizer. Triton compiles only in a
# process without the tests of its interpreter, and so much that it takes several processes. What torch and Triton ask of
# the driver in vain is no error of ours.
GPU_WORKERS ?= 8
SANITIZER ?= $(firstword $(shell command -v compute-sanitizer) $(wildcard /usr/local/cuda/bin/compute-sanitizer))
gpu-test: gpu-check gpu-sanitize

gpu-check: .venv/built .venv/tests
	$(BIN)/python -m pytest tests/test_gpu.py -m gpu --numprocesses $(GPU_WORKERS) --dist worksteal $(ARGS)
	$(BIN)/python -m pytest tests/test_torch_ops.py $(ARGS)

gpu-sanitize: .venv/built .venv/tests
ifeq ($(SANITIZER),)
	@echo "compute-sanitizer is not installed: memcheck and racecheck were not run"
else
	for tool in memcheck racecheck; do $(SANITIZER) --tool $$tool --report-api-errors no --error-exitcode 1 \
		$(BIN)/python -m pytest tests/test_gpu.py -m gpu -k small $(ARGS) || exit 1; done
endif

# make gpu-bench PROVIDER=cuda OP=merge CASE=mlp METHOD=ties narrows it.
gpu-bench: .venv/built .venv/tests
	$(BIN)/python -m pytest bench/test_gpu.py $(CHOSEN) --csv bench/results/gpu.csv $(ARGS)

clean:
	rm -rf .venv .venv-mergekit build dist

.venv/python:
ifdef OFFLINE
	$(PYTHON) -m venv --without-pip .venv
	$(PYTHON) -c '$(SEEN)' "$$($(BIN)/python -c 'import site; print(*site.getsitepackages())')/outer.pth"
else
	$(PYTHON) -m venv .venv
	$(PIP) $(TOOLS)
endif
	touch $@

.venv/built: .venv/python $(CORE)
	$(PIP) --editable . $(BUILD)
	touch $@

.venv/tests: .venv/built
	$(PIP) $(TORCH)
	$(PIP) --editable '.[test,bench]' $(BUILD)
	touch $@

.venv/docs: .venv/tests
	$(PIP) --editable '.[docs]' $(BUILD)
	touch $@

.venv/linters: .venv/python
	$(PIP) $(LINTERS)
	touch $@

# The peer that our numbers are held against, in an environment of its own; without it those tests are skipped.
.venv-mergekit/built:
	$(PYTHON) -m venv .venv-mergekit
	-.venv-mergekit/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH) && \
	.venv-mergekit/bin/python -m pip install --quiet --disable-pip-version-check mergekit==0.1.5
	touch $@
