# Everything runs in .venv, which is made on first use and brought up to date when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench test-gpu bench-gpu test-kernels clean

help: ## Show this list.
	@echo "make TARGET [PYTHON=python3.12] [ARGS='...']"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile
	@echo
	@echo "Options go into ARGS: make demo ARGS='--backend numpy --plot demo.png', make test ARGS='-k cross_entropy'."

demo: $(VENV)/installed-all ## Fit a character model to English text on every CPU backend, and compare them.
	@$(BIN)/python -m polysoftmax demo $(ARGS)

# One BLAS thread a worker: two workers' threads would spend most of their time waiting for each other.
test: export OMP_NUM_THREADS ?= 1
test: export OPENBLAS_NUM_THREADS ?= 1
test: $(VENV)/installed-test ## Run the whole test suite: every backend found, engines on and portable.
	@$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/installed-test $(VENV)/installed-lint ## Check style and types.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(VENV)/installed-docs ## Build the documentation into docs/_build/html; a warning is an error.
	@$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

bench: $(VENV)/installed-test ## Race every function against its peers; the table, JSON and plots go to benchmarks/results.
	@$(BIN)/python -m benchmarks $(ARGS)

test-gpu: export POLYSOFTMAX_TEST_BACKENDS ?= cupy,torch:cuda,jax:cuda
test-gpu: $(VENV)/installed-gpu ## On a machine with a GPU: the suite on CuPy, PyTorch and JAX there, and the CUDA kernels.
	@$(BIN)/python -m pytest -m gpu $(ARGS)

bench-gpu: $(VENV)/installed-gpu ## On a machine with a GPU: race the CUDA kernels; JSON and plots go to benchmarks/results.
	@$(BIN)/python -m benchmarks.gpu $(ARGS)

test-kernels: $(VENV)/installed-test ## Compile every CUDA kernel for every architecture; this needs no GPU, but some patience.
	@$(BIN)/python -m polysoftmax.engines.cuda $(ARGS)

clean: ## Remove the environment and all that was built.
	rm -rf $(VENV) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing polysoftmax[$*] into $(VENV); the first time, this takes a few minutes."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

# The target is pip, not python: where venv fails half-way (Debian without python3-venv), the next run tries again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "polysoftmax needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	         "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
