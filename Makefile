# make demo, make test: each sets up what it needs in .venv by itself.
#
#   make demo       convert, pre-train, probe: the whole way on this machine, in minutes;
#                   MODALITY=speech (default), vision, text or joint; SEED=0
#   make test       what continuous integration runs
#   make test-all   the full matrices and long faults as well
#   make test-gpu   what needs a CUDA device
#   make setup      only the virtual environment; TORCH=system takes the torch that the site has
#   make clean      removes .venv and the demos' run folders

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODALITY ?= speech
DEMO := runs/demo$(if $(filter-out speech,$(MODALITY)),-$(MODALITY))
# Two ranks: on two GPUs where there are as many, on the one where there is one, else on the CPU.
RANKS := $(shell [ "$$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')" = 1 ] && echo 1 || echo 2)
SEED ?= 0

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test test-all test-gpu lint clean

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
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: setup lint
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf $(VENV) runs/demo runs/demo-*
