# Every target builds .venv first if it needs one. The programs themselves are in scripts/ and
# megatron_came/quickstart/; "python -m megatron_came.quickstart --help" lists all its options.

SHELL := /bin/bash
BIN := .venv/bin

# A variable's value as one word of the shell's, whatever is in it: neither make nor the shell runs
# any of it. (A variable that is exported is expanded by make.)
quoted = '$(subst ','\'',$(value $(1)))'
unexport TEXT RANKS PORT ITERATIONS

# Variables given on the command line become options of the quick start; TEXT may name several files.
OPTIONS = $(if $(value TEXT),--text $$text) $(if $(value RANKS),--ranks $(call quoted,RANKS)) \
	$(if $(value PORT),--port $(call quoted,PORT)) \
	$(if $(value ITERATIONS),--iterations $(call quoted,ITERATIONS))

.PHONY: help venv quickstart test test-all test-triton test-hosts check-mutations gpu-check kernel-report benchmarks pictures check lock clean-quickstart

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv:  ## build .venv (PYTHON=path, TORCH=newest or a version)
	@scripts/make_venv.sh

quickstart: venv  ## train a small GPT-2 with CAME and AdamW (TEXT="files", RANKS=2, PORT=, ITERATIONS=)
	@text=$(call quoted,TEXT); $(BIN)/python -m megatron_came.quickstart $(OPTIONS)

# Three files at a time, since tests wait for processes that they start: two leave a quarter of two cores idle.
QUICK = not matrix and not interpreted

test: venv  ## run the tests: three files at a time, then those that measure time
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m "$(QUICK) and not alone"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "$(QUICK) and alone" $$(grep -rl --include=test_*.py mark.alone tests)

test-all: venv  ## run the full matrix of layouts and checkpoints as well
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not interpreted"

test-triton: venv  ## run the long tests of the Triton kernels under Triton's interpreter (half an hour; no GPU needed)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m interpreted

check-mutations: venv  ## break the package on purpose, one fault at a time, to see that the tests notice
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/check_mutations.py

gpu-check:  ## check and time the Triton kernels (PYTHON=python; needs PyTorch, NumPy, Triton, a C compiler and a GPU alone)
	@python=$(call quoted,PYTHON); "$${python:-python3}" scripts/gpu_check.py

kernel-report: venv  ## judge the Triton kernels by their machine code, without a GPU (ARCH=sm_90, TRITON=folder, JSON=file)
	@$(BIN)/python scripts/kernel_report.py $(if $(value ARCH),--arch $(call quoted,ARCH)) \
		$(if $(value TRITON),--triton $(call quoted,TRITON)) $(if $(value JSON),--json $(call quoted,JSON))

benchmarks: venv  ## measure what docs/performance.md shows on this machine's CPU, and write that page
	@scripts/benchmarks.sh

pictures: venv  ## draw the pictures of README and docs
	@$(BIN)/python scripts/pictures.py && $(BIN)/python scripts/architecture.py

# The releases that are tested beside the installed one, each in a folder of its own.
HOSTS := $(addprefix build/hosts/,0.16.1 0.17.1 0.18.2 0.19.0)
PIP_INTO = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target

$(HOSTS): | venv
	@echo "Downloading megatron-core $(@F)."
	@rm -rf $@.part && $(PIP_INTO) $@.part megatron-core==$(@F) && mv $@.part $@

build/hosts/packages: tests/releases/requirements.txt
build/hosts/frameworks: tests/releases/frameworks.txt
build/hosts/packages build/hosts/frameworks: | venv
	@rm -rf $@ $@.part && $(PIP_INTO) $@.part --requirement $< && mv $@.part $@

test-hosts: $(HOSTS) build/hosts/packages build/hosts/frameworks  ## test other releases of Megatron, verl and Megatron-Bridge (MEGATRON_CHECKOUTS=folder for checkouts)
	@OMP_NUM_THREADS=1 MEGATRON_HOSTS=$(CURDIR)/build/hosts $(BIN)/python -m pytest -q -rs tests/releases

check: venv  ## run the linters, the format check and the type checker
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(BIN)/shellcheck -x scripts/*.sh examples/*/train_*.sh docker/*.sh

lock:  ## pin the packages of the container (docker/)
	@docker/lock.sh

clean-quickstart:  ## remove what the quick start made
	rm -rf quickstart
