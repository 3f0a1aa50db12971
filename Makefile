# Every command that anyone runs. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
# Where there is no GPU, take torch's CPU wheel: the default wheel on Linux brings gigabytes of CUDA packages.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
ifneq ($(shell uname -s),Linux)
TORCH_PIP := "torch==$(TORCH)"
else ifeq ($(shell command -v nvidia-smi),)
TORCH_PIP := "torch==$(TORCH)+cpu" --extra-index-url $(CPU_INDEX)
else
TORCH_PIP := "torch==$(TORCH)"
endif
CORES := $(shell $(PYTHON) -c "import os; print(os.cpu_count() or 1)")
# Two ranks wait for each other a few times a step, two threads hundreds of times: on a busy machine that is several times slower.
RANKS ?= $(shell [ $(CORES) -ge 2 ] && echo 2 || echo 1)
THREADS ?= $(shell [ $(CORES) -ge $(RANKS) ] && echo $$(($(CORES) / $(RANKS))) || echo 1)
PRIVATE := --rdzv-backend=private --rdzv-endpoint=127.0.0.1:0
TORCHRUN := OMP_NUM_THREADS=$(THREADS) $(BIN)/torchrun $(PRIVATE) --nproc-per-node=$(RANKS)

.PHONY: help corpus pretrain test test-slow test-layouts test-reshard test-faults test-integrations test-integrations-slow test-slurm test-image test-gpu bench-gpu bench-export lint types format docs aot clean
help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; this is $$($(PYTHON) -V). Set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --retries 1 --no-deps $(TORCH_PIP)
	@touch $@

$(VENV)/.installed: $(VENV)/.made setup.py constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.made setup.py constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed

CORPUS := data/stdlib/sentencepiece-1024.model
$(CORPUS): | $(VENV)/.installed
	$(BIN)/python launch/prepare_data.py --default-corpus data/stdlib --train-sentencepiece 1024

corpus: $(CORPUS) ## tokenizer and corpus made from Python's standard library, under data/stdlib

pretrain: $(VENV)/.installed $(CORPUS) ## train configs/quickstart.yaml on the default corpus (RANKS=1 or 2)
	$(TORCHRUN) launch/pretrain.py configs/quickstart.yaml $(ARGS)

# A file's tests stay in one process, so that what its fixtures computed is computed once.
test: lint types $(VENV)/.installed-dev ## lint, types and the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: $(VENV)/.installed-dev ## tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(ARGS)

test-layouts: $(VENV)/.installed-dev ## every router under every layout beside one process: the better part of an hour on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" tests/distributed/test_layouts.py $(ARGS)

$(VENV)/.installed-integrations: $(VENV)/.made setup.py constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,hf,eval,wandb,deepspeed]' accelerate
	$(BIN)/pip install --quiet -c constraints.txt --no-deps megatron-core
	@touch $@ $(VENV)/.installed $(VENV)/.installed-dev

test-integrations: $(VENV)/.installed-integrations ## beside other projects' packages: transformers, lm-eval, megatron-core, DeepSpeed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "integration and not slow" tests/integrations $(ARGS)

test-integrations-slow: $(VENV)/.installed-integrations ## DeepSpeed with the optimizer on the CPU, for which it compiles first: minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "integration and slow" tests/integrations $(ARGS)

test-slurm: $(VENV)/.installed-dev ## the scripts of launch/slurm on a SLURM of two nodes on this machine (root; installs slurm-wlm and munge)
	tests/slurm/cluster.sh $(BIN)/python -m pytest -v -m slurm tests/slurm $(ARGS)

test-image: ## build docker/Dockerfile.cpu without a Docker engine and train in it (root on Debian; minutes)
	docker/try_cpu_image.sh $(ARGS)

test-reshard: $(VENV)/.installed-dev ## checkpoints of six layouts, each taken up under each of the others: minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" tests/distributed/test_reshard.py $(ARGS)

FAULT_DATA ?= runs/campaign.jsonl
test-faults: $(VENV)/.installed-dev ## more than a hundred faults in real runs, rows in FAULT_DATA: half an hour; needs leave to mount a small disk
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/campaign.py run $(FAULT_DATA) $(ARGS)
	$(BIN)/python tests/faults/campaign.py table $(FAULT_DATA)

NEEDS_GPU = @$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("NOT RUN: make $@ needs a CUDA device, and this torch sees none")'

# Small shapes under the sanitizers: they slow a kernel down a hundredfold. Without torch's cache each tensor is an allocation of its own,
# so that memcheck sees where it ends.
SANITIZED := -m gpu tests/kernels -k sanitizer -p no:cacheprovider
test-gpu: $(VENV)/.installed-dev ## kernel tests on a CUDA device, then memcheck and racecheck where compute-sanitizer is installed
	$(NEEDS_GPU)
	$(BIN)/python -m pytest -m gpu $(ARGS)
	@for tool in memcheck racecheck; do \
	  if command -v compute-sanitizer > /dev/null; then \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python -m pytest $(SANITIZED) || exit 1; \
	  else echo "compute-sanitizer is not installed: $$tool was not run"; fi; done

BENCH_DATA ?= kernels/benchmarks/data
bench-gpu: $(VENV)/.installed-dev ## kernels beside their rivals, then end to end, on a CUDA device; rows go to kernels/benchmarks/data
	$(NEEDS_GPU)
	$(BIN)/python kernels/benchmarks/run.py --output $(BENCH_DATA)/kernels.jsonl $(ARGS)
	for router in recurrent topk; do \
	  $(BIN)/torchrun $(PRIVATE) --nproc-per-node=1 launch/benchmark.py configs/rmoe_1b_8xa100.yaml data.tokenizer=bytes \
	    model.router.name=$$router model.router.top_k=4 train.micro_batch_size=8 train.global_batch_size=16 \
	    --output $(BENCH_DATA)/training.jsonl || exit 1; done

EXPORTED := data.tokenizer=bytes model.router.name=topk model.hidden_size=512 model.num_layers=12 model.num_heads=8 \
  model.num_experts=32 model.ffn_hidden_size=512 train.steps=1 train.global_batch_size=1 train.micro_batch_size=1 train.seq_len=64 \
  eval.max_rows=1 sample.max_tokens=0
bench-export: $(VENV)/.installed-integrations ## peak memory of exports to Hugging Face beside the model's size; rows in kernels/benchmarks/data
	scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && \
	head -c 4000 README.md > $$scratch/text.txt && \
	$(BIN)/python launch/prepare_data.py $$scratch/text.txt --output $$scratch/text && \
	$(BIN)/python launch/pretrain.py configs/quickstart.yaml $(EXPORTED) run.dir=$$scratch/run \
	  data.train=$$scratch/text data.valid=$$scratch/text data.test=$$scratch/text && \
	$(BIN)/python launch/convert.py to-hf $$scratch/run $$scratch/stock --memory $(BENCH_DATA)/export.jsonl && \
	$(BIN)/python launch/convert.py to-hf $$scratch/run $$scratch/remote --remote-code --memory $(BENCH_DATA)/export.jsonl

aot: $(VENV)/.installed-dev ## compile every Triton kernel for every architecture; prints registers, shared memory, instructions
	$(BIN)/python -m moe_kernels.aot $(ARGS)

lint: $(VENV)/.installed-dev ## ruff, shellcheck, hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck -x .ci/run docker/*.sh launch/slurm/*.sbatch launch/slurm/*.env tests/slurm/*.sh
	$(BIN)/hadolint docker/Dockerfile.cpu docker/Dockerfile.gpu

types: $(VENV)/.installed-dev ## mypy
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## rewrite files as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed ## write docs/routers.md from the routers' docstrings and keys
	$(BIN)/python docs/make_routers.py > docs/.routers.md && mv docs/.routers.md docs/routers.md

clean: ## remove caches and the virtual environment
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
