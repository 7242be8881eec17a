# Everything runs in .venv, which is made on first use and brought up to date when pyproject.toml, constraints.txt or the
# C++ sources change.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

# The range of NVRTC that the extra admits; its ends are installed into folders of their own, for the kernels' tests.
NVRTC := $(shell sed -n 's/.*"\(nvidia-cuda-nvrtc[^"]*\)".*/\1/p' pyproject.toml)
NVRTC_OLDEST := $(VENV)/nvrtc-oldest
NVRTC_NEWEST := $(VENV)/nvrtc-newest

NATIVE := CMakeLists.txt $(wildcard src/polysoftmax/native/*.cpp src/polysoftmax/native/*.hpp)

# Where there is a compiler, an error in the C++ sources is an error here. Elsewhere, polysoftmax does without the library.
COMPILERS := $(shell for one in $${CXX:-c++ g++ clang++}; do command -v $$one; done; true)
export POLYSOFTMAX_NATIVE ?= $(if $(COMPILERS),required)

.DEFAULT_GOAL := help
.PHONY: help demo test test-quick test-oldest test-newest test-build fuzz-native lint docs figures dist bench accuracy gpu gpu-prepare gpu-report test-gpu test-kernels clean

help: ## Show this list.
	@echo "make TARGET [PYTHON=python3.12] [ARGS='...']"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile
	@echo
	@echo "Options go into ARGS: make demo ARGS='--backend numpy --plot demo.png', make test ARGS='-k cross_entropy'."

demo: $(VENV)/installed-all ## Fit a character model to English text on every CPU backend, and compare them.
	@$(BIN)/python -m polysoftmax demo $(ARGS)

# One BLAS thread a worker: two workers' threads would spend most of their time waiting for each other. Tests that follow
# one another stay together, for the programs that they compile.
test test-quick: export OMP_NUM_THREADS ?= 1
test test-quick: export OPENBLAS_NUM_THREADS ?= 1
test: export POLYSOFTMAX_TEST_NVRTC ?= $(abspath $(NVRTC_OLDEST))
test: $(VENV)/installed-test $(NVRTC_OLDEST) ## Run the whole test suite: every backend found, engines on and portable.
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

QUICK := contract losses loss_derivatives sampling sampling_calls truncation same_bits native_rows native_bits native_draws errors engines package matrix

test-quick: export POLYSOFTMAX_TEST_BACKENDS ?= numpy,torch
test-quick: $(VENV)/installed-test ## Run two minutes' worth of tests: NumPy and eager PyTorch, most functions, the C++ kernels.
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(QUICK:%=tests/test_%.py) $(ARGS)

ENDS := contract losses linear streaming partial sampling_calls random
BESIDE_ENDS := rich matplotlib mpmath ml-dtypes hypothesis pytest pytest-xdist

define try_most
	@$(VENV)/$(1)/bin/python -m polysoftmax check --quick --backend numpy jax:fused
	@$(VENV)/$(1)/bin/python -m polysoftmax demo --steps 20 --backend numpy jax
	@$(VENV)/$(1)/bin/python -m pytest -q -p no:cacheprovider $(ENDS:%=tests/test_%.py) $(ARGS)
endef

test-oldest test-newest: export PYTHONPATH := $(abspath src)
test-oldest test-newest: export POLYSOFTMAX_TEST_BACKENDS ?= numpy,jax
test-oldest: $(VENV)/oldest/installed $(VENV)/installed-test ## On the oldest NumPy, JAX and array-api-compat admitted: most functions, both tools.
	$(call try_most,oldest)

test-newest: $(VENV)/installed-test ## The same on the newest that PYTHON can install, upgraded each time.
	@$(PYTHON) -m venv $(VENV)/newest
	@$(VENV)/newest/bin/python -m pip install -qq --disable-pip-version-check --upgrade numpy jax array-api-compat $(BESIDE_ENDS)
	$(call try_most,newest)

test-build: $(VENV)/installed-test ## Build wheels and a source distribution, and install without a compiler: the tests that call pip.
	@$(BIN)/python -m pytest -m build tests/test_native_build.py $(ARGS)

fuzz-native: $(VENV)/installed-test ## Run random problems through the C++ library, compiled with the sanitizers; ARGS='--cases N --seed N'.
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/native_fuzz.py $(ARGS)

lint: $(VENV)/installed-test $(VENV)/installed-lint ## Check style and types.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(VENV)/installed-docs ## Build the documentation into docs/_build/html; a warning is an error.
	@$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

figures: export PYTHONPATH := $(CURDIR)
figures: $(VENV)/installed-docs ## Draw the guide's figures, and write its tables of backends, errors and draws, anew.
	@$(BIN)/python docs/figures.py
	@$(BIN)/python docs/tables.py

dist: ## Build the source distribution and the wheel into dist, check them, and try them in empty environments.
	@$(PYTHON) tools/dist.py $(ARGS)

bench: $(VENV)/installed-test ## Race every function against its peers; the table, JSON and plots go to benchmarks/results.
	@$(BIN)/python -m benchmarks $(ARGS)

accuracy: $(VENV)/installed-test ## Measure errors in ulp, ours and the peers'; make figures takes what goes to benchmarks/results.
	@$(BIN)/python -m benchmarks.accuracy $(ARGS)

gpu: ## On a machine with a GPU, with the libraries of PYTHON: is it right, and how fast is it?
	@$(PYTHON) tools/gpu_session.py $(ARGS)

gpu-prepare: $(VENV)/installed-test $(NVRTC_OLDEST) ## Without a GPU: compile what make gpu launches, by the oldest NVRTC, into .gpu/cache.
	@$(BIN)/python tools/gpu_session.py --prepare --nvrtc $(NVRTC_OLDEST) $(ARGS)

gpu-report: $(VENV)/installed-all ## Without a GPU: make a table and plots of what make gpu wrote; ARGS=FOLDER if not .gpu/results.
	@$(BIN)/python -m tools.gpu_report $(or $(ARGS),.gpu/results)

test-gpu: export POLYSOFTMAX_TEST_BACKENDS ?= cupy,torch:cuda,jax:cuda
test-gpu: $(VENV)/installed-gpu ## On a machine with a GPU and a network: the whole suite on CuPy, PyTorch and JAX there.
	@$(BIN)/python -m pytest -m gpu $(ARGS)

test-kernels: $(VENV)/installed-test $(NVRTC_OLDEST) $(NVRTC_NEWEST) ## Compile one CUDA kernel in ten (ARGS='--every 1': all), with the oldest and the newest NVRTC.
	@for nvrtc in $(NVRTC_OLDEST) $(NVRTC_NEWEST); do \
	    $(BIN)/python -m polysoftmax.engines.cuda --nvrtc $$nvrtc $(or $(ARGS),--every 10) || exit 1; \
	done

clean: ## Remove the environment and all that was built.
	rm -rf $(VENV) .gpu/cache build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f src/polysoftmax/native/libpolysoftmax.so
	find src tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +

# What comes with an installation need not be installed by itself.
BESIDE_test := all
BESIDE_dev := all test lint docs

# Without isolation, so that the build folder stays valid and a change of one C++ file compiles that file alone.
$(VENV)/installed-%: pyproject.toml constraints.txt $(NATIVE) | $(VENV)/build-tools
	@echo "Installing polysoftmax[$*] into $(VENV); the first time, this takes a few minutes."
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
	    --no-build-isolation -e '.[$*]'
	@touch $@ $(BESIDE_$*:%=$(VENV)/installed-%)

$(VENV)/oldest/installed: constraints-oldest.txt
	@echo "Installing the oldest NumPy, JAX and array-api-compat into $(VENV)/oldest."
	@$(PYTHON) -m venv $(VENV)/oldest
	@$(VENV)/oldest/bin/python -m pip install -qq --disable-pip-version-check -c $< numpy jax array-api-compat $(BESIDE_ENDS)
	@touch $@

$(VENV)/build-tools: | $(BIN)/pip
	@$(BIN)/python -m pip install -qq --disable-pip-version-check cmake ninja scikit-build-core
	@touch $@

$(NVRTC_OLDEST): NVRTC := $(shell echo '$(NVRTC)' | sed 's/>=\([0-9.]*\).*/==\1/')
$(NVRTC_OLDEST) $(NVRTC_NEWEST): pyproject.toml | $(BIN)/pip
	@echo "Installing $(NVRTC) into $@."
	@rm -rf $@
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $@ '$(NVRTC)'
	@touch $@

# The target is pip, not python: where venv fails half-way (Debian without python3-venv), the next run tries again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "polysoftmax needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	         "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
