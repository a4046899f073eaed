# SPDX-License-Identifier: Apache-2.0
# Each target sets up .venv itself the first time. PYTHON=... picks the
# interpreter; without it scripts/find-python looks where users have them.

PYTHON ?=
BIN := .venv/bin
# When these change, the environment is installed anew.
REQUIREMENTS := setup.cfg setup.py pyproject.toml \
  $(wildcard kernels/tritera_kernels/cpu/*.cc kernels/tritera_kernels/cpu/*.h)

.PHONY: help quickstart test check bench hf gguf gpu gpu-train tpu-compile clean
.DELETE_ON_ERROR:

help:
	@echo 'make quickstart   train a small ternary model on this machine, pack it, use it'
	@echo 'make test         the whole test suite'
	@echo 'make check        format, lint and types'
	@echo 'make bench        time the kernels and a 1.1B model (five minutes)'
	@echo 'make hf           compare with transformers (torch, some minutes; HF_PYTHON)'
	@echo 'make gguf         run the quickstart in llama.cpp (minutes to build it)'
	@echo 'make gpu          check, tune and time the GPU kernels (25 minutes)'
	@echo 'make gpu-train    time training of TriLM 99M, 390M, 1.1B and their twins'
	@echo 'make tpu-compile  compile the TPU kernels, without a TPU (221 MB to fetch)'
	@echo 'make clean        remove the environment and the quickstart run'

quickstart: .venv/core
	@$(BIN)/python -m tritera_jax.quickstart

test: .venv/test
	@$(BIN)/python -m pytest -n 2

check: .venv/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

bench: .venv/core
	@$(BIN)/python kernels/bench/matmul.py --shapes 4096 1.1b_gate_up
	@$(BIN)/python kernels/bench/decode.py
	@$(BIN)/python kernels/bench/decode.py --format base_three
	@$(BIN)/python kernels/bench/contention.py

# torch has no CPU build for every Python: this one's environment is its own.
# From PyPI it may come with CUDA's libraries (2 GB); PIP_EXTRA_INDEX_URL names
# an index with another, such as https://download.pytorch.org/whl/cpu.
HF_PYTHON ?= python3.11
hf: .venv/test .venv/hf/installed
	@TRITERA_TRANSFORMERS=$(CURDIR)/.venv/hf/bin/python \
	  $(BIN)/python -m pytest -s tests/interop/huggingface/test_transformers.py

.venv/hf/installed: Makefile | .venv/test
	@$(HF_PYTHON) -m venv .venv/hf
	@echo 'installing torch and transformers (a minute or two)'
	@.venv/hf/bin/python -m pip install --quiet --disable-pip-version-check \
	  torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 accelerate
	@touch $@

# RUN=... takes another run whose matrices are whole blocks of 256.
gguf: .venv/peers
	@PYTHONPATH=.:kernels $(BIN)/python -m tests.drills.llama_cpp_reads \
	  $(or $(RUN),runs/quickstart)

# With PYTHON=... that Python is used as it is, and nothing is installed: on a
# machine that reaches no registry. ARGS='--only check limits' runs some stages.
gpu: $(if $(PYTHON),,.venv/gpu)
	@$(or $(PYTHON),$(BIN)/python) kernels/bench/gpu.py run $(ARGS)

# ARGS='--seconds 60' tries fewer layouts; --out FOLDER keeps the table.
gpu-train: $(if $(PYTHON),,.venv/gpu)
	@PYTHONPATH=.:kernels $(or $(PYTHON),$(BIN)/python) \
	  -c 'import sys; from tritera_jax import cli; sys.exit(cli.main())' \
	  bench train --spectra $(ARGS)

tpu-compile: .venv/core
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps libtpu==0.0.48
	@$(BIN)/python kernels/bench/tpu_compile.py

clean:
	rm -rf .venv runs/quickstart data/quickstart

# An environment whose interpreter has gone is made anew.
.venv/core: $(REQUIREMENTS) scripts/find-python
	@python=$$(PYTHON='$(PYTHON)' scripts/find-python) && \
	  if ! $(BIN)/python -c '' 2>/dev/null; then \
	    echo "making .venv with $$python"; \
	    rm -rf .venv && "$$python" -m venv .venv; \
	  fi
	@echo 'installing tritera_jax and what it needs (a minute or two)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/gpu: .venv/core
	@echo 'installing what a GPU needs (some minutes)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -e '.[gpu]'
	@touch $@

.venv/peers: .venv/core
	@echo 'building llama.cpp (some minutes, and a C++ compiler)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -e '.[peers]'
	@touch $@

# The plugin without the CUDA libraries that it asks for is 20 MB, and enough
# to lower Triton kernels for a GPU on a machine that has none.
.venv/test: .venv/core
	@echo 'installing what the tests need (a minute or two)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -e '.[test]'
	@jax=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps "jax-cuda13-plugin==$$jax"
	@touch $@
