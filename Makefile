# Every target builds .venv first if it needs one. The programs themselves are in scripts/ and
# megatron_came/quickstart/; "python -m megatron_came.quickstart --help" lists all its options.

SHELL := /bin/bash
BIN := .venv/bin

# Variables given on the command line become options of the quick start.
OPTIONS = $(if $(TEXT),--text $(TEXT)) $(if $(RANKS),--ranks $(RANKS)) \
	$(if $(PORT),--port $(PORT)) $(if $(ITERATIONS),--iterations $(ITERATIONS))

.PHONY: help venv quickstart test test-all check-mutations gpu-check benchmarks check lock clean-quickstart

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv:  ## build .venv (PYTHON=path names the interpreter)
	@scripts/make_venv.sh

quickstart: venv  ## train a small GPT-2 with CAME and AdamW (TEXT="files", RANKS=2, PORT=, ITERATIONS=)
	@$(BIN)/python -m megatron_came.quickstart $(OPTIONS)

test: venv  ## run the tests
	@# The tests start several processes of their own.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

test-all: venv  ## run the full matrix of layouts and checkpoints as well
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "matrix or not matrix"

check-mutations: venv  ## break the package on purpose, one fault at a time, to see that the tests notice
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/check_mutations.py

gpu-check:  ## check and time the Triton kernels (PYTHON=python; needs PyTorch, NumPy, Triton and a GPU alone)
	@$(or $(PYTHON),python3) scripts/gpu_check.py

benchmarks: venv  ## measure what docs/performance.md shows on this machine's CPU, and write that page
	@scripts/benchmarks.sh

check: venv  ## run the linters, the format check and the type checker
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(BIN)/shellcheck -x scripts/*.sh examples/*/train_*.sh docker/*.sh

lock:  ## pin the packages of the container (docker/)
	@docker/lock.sh

clean-quickstart:  ## remove what the quick start made
	rm -rf quickstart
