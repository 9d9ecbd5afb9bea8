# make demo    train a character model with torch.nn.LSTM and with hsm_kernels.LSTM, and compare
# make demo-memory, make demo-audio    the same for an agent with memory, and for an audio effect
# make test    lint; the tests with the built library, with none, and with one built just in time
# Both work on a machine that has nothing but python3 (3.10 or later), make and a network.

PYTHON ?= python3
VENV ?= .venv
# Installed where $(PYTHON) has no torch of its own.
TORCH ?= torch==2.13.0
# Without a GPU torch's CPU build is enough, and much smaller. Empty: only the package index.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)
PIP_FLAGS ?=
ARGS ?=
# For test-versions.
TORCH_VERSIONS ?= 2.11.0 2.13.0 2.14.1

BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet $(PIP_FLAGS)
# From the folder of the tests, where Python finds the installed package and not its sources.
PYTEST := cd tests && $(abspath $(BIN))/python -m pytest
# A thread of OpenMP that spins while it waits may hold the core of the one that it waits for: on a busy machine tests take ten times as long.
WAIT_PASSIVELY := export OMP_WAIT_POLICY=passive;
# Of no use without the library, or too long for what they say then.
NEEDS_LIBRARY := test_abi.py test_build.py test_compile.py test_compile_cuda.py test_jit.py test_parallel.py sim
SOURCES := $(shell find hsm_kernels csrc -name '*.py' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.inl')

.PHONY: demo demo-memory demo-audio test lint test-wheel test-none test-jit test-versions peers bench bench-full bench-boundaries bench-transforms clean
.NOTPARALLEL:

demo: $(VENV)/installed
	$(BIN)/python examples/char_lm.py $(ARGS)

demo-memory: $(VENV)/installed
	$(BIN)/python examples/rl_memory.py $(ARGS)

demo-audio: $(VENV)/installed
	$(BIN)/python examples/audio_effect.py $(ARGS)

test: lint test-wheel test-none test-jit

lint: $(VENV)/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# Everything, with the library of the wheel. The README's examples are in tests/test_readme.py.
test-wheel: $(VENV)/installed
	$(WAIT_PASSIVELY) $(PYTEST) --ignore test_jit.py --ignore test_oversubscription.py $(ARGS)
	$(PYTEST) test_oversubscription.py $(ARGS) || test $$? = 5
	$(PYTEST) --doctest-modules --pyargs hsm_kernels

# The reference alone.
test-none: $(VENV)/installed
	$(WAIT_PASSIVELY) export HSM_KERNELS_BUILD=none; $(PYTEST) $(NEEDS_LIBRARY:%=--ignore %) $(ARGS)

# The just-in-time build and its faults; then what an operator computes once more, with a library built so.
test-jit: $(VENV)/installed
	$(PYTEST) test_jit.py $(ARGS)
	$(WAIT_PASSIVELY) export HSM_KERNELS_JIT=force HSM_KERNELS_CACHE_DIR=$(CURDIR)/build/jit-cache; \
	    $(PYTEST) test_ops.py -k 'the_reference or opcheck' $(ARGS)

# One library, several torches, and the sources with the headers of each. Downloads each of them, with CUDA several gigabytes: TORCH_INDEX has smaller ones.
test-versions: $(VENV)/installed
	set -e; for version in $(TORCH_VERSIONS); do \
	    target=$(CURDIR)/build/torch-$$version; \
	    test -d $$target || $(PIP) $(TORCH_INDEX:%=--extra-index-url %) --target $$target torch==$$version; \
	    (export PYTHONPATH=$$target HSM_KERNELS_JIT=0; $(PYTEST) -s test_abi.py test_ops.py $(ARGS)); \
	    (export PYTHONPATH=$$target HSM_KERNELS_JIT=force HSM_KERNELS_BACKEND=cpu HSM_KERNELS_CACHE_DIR=$(CURDIR)/build/jit-$$version; \
	        cd tests && $(abspath $(BIN))/python -c 'import hsm_kernels; info = hsm_kernels.build_info(); print(info); assert info.loaded'); \
	done

bench: peers
	$(BIN)/python benchmarks/bench_rnn.py --quick $(ARGS)

bench-full: peers
	$(BIN)/python benchmarks/bench_rnn.py --full $(ARGS)

# The runtimes to compare with. What cannot be installed is left out of the comparison.
peers: $(VENV)/installed
	test -f $(VENV)/peers || { $(PIP) "$$(echo build/wheel/*.whl)[bench]" && touch $(VENV)/peers; } || \
	    echo "make: not all peers could be installed; the benchmark measures without them"

bench-boundaries: $(VENV)/installed
	$(BIN)/python benchmarks/bench_boundaries.py $(ARGS)

bench-transforms: $(VENV)/installed
	$(BIN)/python benchmarks/bench_transforms.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info

# A torch that $(PYTHON) can import is reused: its folders are appended to the search path of the environment.
REUSE_TORCH := import sys, torch; \
    print(*[p for p in sys.path if p.endswith(("site-packages", "dist-packages"))], sep="\n"); \
    sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))

$(VENV)/torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "hsm_kernels needs Python 3.10 or later")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	if $(PYTHON) -c '$(REUSE_TORCH)' > $(VENV)/reuse.pth 2> /dev/null; then \
	    mv $(VENV)/reuse.pth $(VENV)/lib/python3.*/site-packages/; \
	else \
	    rm $(VENV)/reuse.pth; \
	    $(PIP) --no-deps --retries 1 $(TORCH_INDEX:%=--extra-index-url %) $(TORCH) && $(PIP) $(TORCH); \
	fi
	$(PIP) 'setuptools>=77'
	touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml setup.py MANIFEST.in README.md $(SOURCES)
	rm -rf build/lib* build/bdist* build/wheel
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(PIP) --force-reinstall --no-deps build/wheel/*.whl
	$(PIP) "$$(echo build/wheel/*.whl)[dev,demo]"
	touch $@
