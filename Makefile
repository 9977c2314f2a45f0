# make demo and make test create .venv automatically.
#
#   make demo       converts, pre-trains and probes on this machine, in minutes;
#                   MODALITY=speech (default), vision, text or joint; SEED=0
#   make test       lint, and the tests that continuous integration runs
#   make test-all   also full matrices, long-running fault tests and fuzzing
#   make test-gpu   tests that need a CUDA device
#   make fuzz       damaged and hostile inputs for every parser; INPUTS=100000 for each
#   make setup      only the virtual environment; TORCH=system uses your site's torch
#   make clean      removes .venv and the run folders of the demos

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODALITY ?= speech
DEMO := runs/demo$(if $(filter-out speech,$(MODALITY)),-$(MODALITY))
# Two ranks, on GPUs or on the CPU; one rank if there is only one GPU.
RANKS := $(shell [ "$$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')" = 1 ] && echo 1 || echo 2)
SEED ?= 0
INPUTS ?= 100000
# Two test processes: tests with several ranks occupy two cores by themselves.
PARALLEL := -n 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test test-all test-gpu fuzz lint clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
ifeq ($(TORCH),system)
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(BIN)/python -c "import torch; print('torch', torch.__version__, 'of this site')"
	$(BIN)/python -m pip install -q --no-deps -e .
else
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps torchaudio
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
endif
	touch $(READY)

demo: setup
	$(BIN)/python benchmarks/probe.py $(MODALITY) --out $(DEMO) --seeds $(SEED) --nproc $(RANKS)
	@echo
	@echo "shards       $(DEMO)/shards"
	@echo "checkpoints  $(DEMO)/checkpoints"
	@echo "curves       $(BIN)/tensorboard --logdir $(DEMO)/tb"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup lint
	$(BIN)/python -m pytest -m "not slow and not gpu" $(PARALLEL)

test-all: setup lint
	$(BIN)/python -m pytest -m "not gpu" $(PARALLEL)

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

fuzz: setup
	$(BIN)/python -m tests.fuzz --inputs $(INPUTS) --seed $(SEED)

clean:
	rm -rf $(VENV) runs/demo runs/demo-*
