# Every target sets up what it needs in .venv, once. GNU make 3.81 or newer, Python 3.10 to 3.13.
#   make chat ARGS="--bits 4"      make test ARGS="-k tokenizer"      make test PYTHON=python3.12
#   make chat CPU=1                # on Linux without an NVIDIA GPU: PyTorch without 5 GB of CUDA

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
COMPAT ?= tests
CPU ?=
JOBS ?= 2
MINI ?= .cache/mini
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CHATTING := $(VENV)/.installed-for-chat
WORKING := $(VENV)/.installed-for-work

# pip takes the builds of PyTorch for CPUs ("2.14.1+cpu") for newer than those of the usual index.
ifeq (1,$(CPU))
export PIP_EXTRA_INDEX_URL := $(PIP_EXTRA_INDEX_URL) https://download.pytorch.org/whl/cpu
endif

.PHONY: help setup chat test parity compat alone lint fmt types check bench-formats bench-memory bench-generate bench-gpu bench-kernels bench-tokenizer bench-train bench-report endurance train-mini vocabulary-mini clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1  -  \2/p' Makefile

setup: $(WORKING) ## install everything for work on the project

chat: $(CHATTING) ## chat with the model of this folder
	@$(BIN)/chatglm chat $(ARGS)

test: $(WORKING) ## run all tests, JOBS of them at once
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

parity: $(WORKING) ## compare with the original code's numbers
	$(BIN)/python -m pytest tests/parity $(ARGS)

compat: $(WORKING) ## test on every supported transformers; COMPAT="tests(newest)" on what is newest
	$(BIN)/nox --noxfile tools/noxfile.py --session "$(COMPAT)" -- $(ARGS)

alone: $(WORKING) ## test the model's files without the package and without llvmlite
	$(BIN)/nox --noxfile tools/noxfile.py --session alone -- $(ARGS)

lint: $(WORKING) ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fmt: $(WORKING) ## mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(WORKING) ## check types
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint types test ## all that a change must pass

bench-formats: $(WORKING) ## measure what each format of packed weights costs
	$(BIN)/python -m benchmarks.bench_formats $(ARGS)

bench-memory: $(WORKING) ## measure the memory that loading the 6B model quantized takes (14 GB of disk)
	$(BIN)/python -m benchmarks.bench_memory $(ARGS)

bench-generate: $(WORKING) ## measure reading, decoding, memory and loading at full size (ARGS="--write" keeps the rows)
	$(BIN)/python -m benchmarks.bench_generate $(ARGS)

bench-gpu: $(WORKING) ## measure a decoding step on an NVIDIA GPU, or say what to run on one
	$(BIN)/python -m benchmarks.bench_gpu $(ARGS)

bench-kernels: $(WORKING) ## measure single products, ours and others'
	$(BIN)/python -m benchmarks.bench_kernels $(ARGS)

bench-tokenizer: $(WORKING) ## measure the tokenizer
	$(BIN)/python -m benchmarks.bench_tokenizer $(ARGS)

bench-train: $(WORKING) ## measure a training step of 6B blocks, beside plain torch and peft
	$(BIN)/python -m benchmarks.bench_train $(ARGS)

bench-report: $(WORKING) ## write docs/benchmarks.md and its plots from benchmarks/results.csv
	$(BIN)/python -m benchmarks.report

endurance: $(WORKING) ## try everything very often (hours; ARGS="calls --minutes 5" for a part)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.endurance $(ARGS)
	$(BIN)/python -m benchmarks.endurance.page

train-mini: $(WORKING) ## train the small model of this folder again (hours)
	$(BIN)/python -m recipes.mini.sources --out $(MINI)/data
	$(BIN)/python -m recipes.mini.train --data $(MINI)/data --work $(MINI)/work $(ARGS)
	$(BIN)/python -m recipes.mini.publish --work $(MINI)/work
	$(BIN)/python -m recipes.mini.align --data $(MINI)/data --work $(MINI)/align
	$(BIN)/python -m recipes.mini.publish --model $(MINI)/align/sft
	$(BIN)/python -m recipes.mini.report --data $(MINI)/data --work $(MINI)/work
	$(BIN)/python -m recipes.mini.alignment_page --work $(MINI)/align

vocabulary-mini: $(WORKING) ## learn the small model's vocabulary again: other ids, train anew
	$(BIN)/python -m recipes.mini.sources --out $(MINI)/data
	$(BIN)/python -m recipes.mini.vocabulary --data $(MINI)/data

clean: ## remove what was installed, built and cached
	rm -rf $(VENV) .nox build dist *.egg-info .coverage .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 to 3.13 is needed, \
	$(PYTHON) is %d.%d: name another one with PYTHON=" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

ifneq (,$(filter true 1,$(CI) $(PINNED)))
$(CHATTING) $(WORKING): pyproject.toml requirements-ci.txt | $(BIN)/python
	$(PIP) install --quiet --no-compile --requirement requirements-ci.txt
	$(PIP) install --quiet --no-deps --editable .
	@touch $(CHATTING) $(WORKING)
else
$(CHATTING): pyproject.toml | $(BIN)/python
	@echo "Installing what a chat needs into $(VENV), once; PyTorch is large."
	$(PIP) install --no-compile --editable .
	@touch $@

$(WORKING): pyproject.toml | $(BIN)/python
	@echo "Installing what the tests need into $(VENV), once; PyTorch is large."
	$(PIP) install --no-compile --editable ".[train,dev]"
	@touch $(CHATTING) $@
endif
