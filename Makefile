# Every target works from a fresh clone in any folder; each sets up first. PYTHON=python3.12 make setup picks an interpreter.

PYTHON ?= python3
TORCH ?= 2.13.0
comma := ,
BIN := .venv/bin
RUN := $(BIN)/python -m prism_pl
STAMP := .venv/.installed

.PHONY: setup check test test-all demo assets clean
.DELETE_ON_ERROR:

setup: $(STAMP)

# With a GPU the CPU build is ruled out by its name. Without one pip takes the CPU build wherever it is offered one (its
# local version sorts higher): from a find-links folder, or from PyTorch's CPU index in PIP_EXTRA_INDEX_URL. Otherwise it
# takes the default build, which is larger and runs without a GPU too.
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -m 1 GPU)
TORCH_SPEC := torch==$(TORCH)$(if $(GPU),$(comma)!=$(TORCH)+cpu)

# The stamp is newer than setup.py after a finished install, so a second `make setup` does nothing.
$(STAMP): setup.py
	@"$(PYTHON)" -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; %s is %s. Try: make setup PYTHON=python3.12" % (sys.executable, sys.version.split()[0]))'
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH_SPEC)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

check: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright

test: setup
	$(BIN)/python -m pytest

test-all: setup
	$(BIN)/python -m pytest -m "not gpu"

demo: setup
	$(RUN) fit --config configs/sft.yaml
	$(RUN) fit --config configs/warmup.yaml
	$(RUN) fit --config configs/align.yaml
	$(RUN) fit --config configs/rlvr.yaml
	$(RUN) test --config configs/evaluate.yaml
	@echo "TensorBoard: $(BIN)/tensorboard --logdir runs"

assets: setup
	$(RUN) fit --config configs/digits/pretrain.yaml
	$(RUN) fit --config configs/sft.yaml
	$(RUN) fit --config configs/warmup.yaml

# Runs are results: clean leaves runs/ alone.
clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
