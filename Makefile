# `make help` lists the targets. Each sets up .venv by itself if need be.
PYTHON ?= python3
RANKS ?=
PYTEST_ARGS ?=
CASES ?=
MINUTES ?= $(if $(CASES),15,0)
BENCH_ARGS ?=
WALK_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.made-from-constraints
BENCH_STAMP := .venv/.has-bench

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv demo test test-cluster fuzz chaos walk checks bench bench-scaling bench-loss clean

help:
	@echo "make venv    .venv with the versions of constraints.txt (PYTHON=$(PYTHON), 3.11 or newer)"
	@echo "make demo    get an encoder and data into demo/, make a teacher and two students, compare (RANKS=processes)"
	@echo "make test    run the tests (PYTEST_ARGS='-k name -x')"
	@echo "make test-cluster  run the tests on a Slurm cluster of several hosts inside this machine (slurm-wlm, munge)"
	@echo "make fuzz    search for wrong inputs that end badly, longer than make test does (FUZZ=30 times as many)"
	@echo "make chaos   kill, stop and damage real runs at random, and compare their losses (MINUTES=5 SEED=7)"
	@echo "make walk    follow README in a clean clone, some 20 minutes; looks at TensorBoard with chromium, if it is there"
	@echo "make checks  lint, format and types"
	@echo "make bench   train with ours and with what people use instead, hours (CASES=mrpc_n1: that one; MINUTES=15 for repeats)"
	@echo "make bench-scaling  what a step of ours costs by samples, length, layers and ranks"
	@echo "make bench-loss  time the fused loss against PyTorch's; see benchmarks/README.md"
	@echo "make clean   remove what these targets made, except .venv and demo/"

venv: $(STAMP)

# A .venv without a working pip is a half-made one: start it anew.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) must be Python 3.11 or newer; choose one with make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || \
	    { echo "$(PYTHON) cannot make a virtual environment; on Debian install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,onnx]'
	@touch $@

# A teacher and an SPS student, then a student of as many parameters that shares nothing, trained alike.
# One rank a GPU (as many as divide the global batch of 64), or two on CPU, which share the cores.
# A free port: ranks of two programs on DeepSpeed's default one would join each other's process group.
demo: $(STAMP)
	$(BIN)/peakd-demo --out demo
	@ranks='$(RANKS)'; \
	[ -n "$$ranks" ] || ranks=$$($(BIN)/python -P -c 'import torch; print(torch.cuda.device_count() or 2)'); \
	while [ $$((64 % ranks)) -ne 0 ]; do ranks=$$((ranks - 1)); done; \
	export PATH="$(CURDIR)/$(BIN):$$PATH"; \
	export OMP_NUM_THREADS="$${OMP_NUM_THREADS:-$$(( ($$(nproc) + ranks - 1) / ranks ))}"; \
	train() { \
	    port=$$($(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'); \
	    (set -x; deepspeed --num_gpus "$$ranks" --master_port "$$port" peakd_ds/train.py \
	        --config peakd_ds/recipes/demo.yaml --data_dir demo/data --export_onnx "$$@"); \
	}; \
	train --teacher demo/encoder --run_dir demo/run && \
	train --teacher demo/run/teacher --student_init demo/encoder --sharing none --run_dir demo/plain && \
	$(BIN)/peakd-compare demo/run demo/plain

# A private folder: two DeepSpeed builds in the user's common one lock each other out. Triton's interpreter needs a
# process of its own: whether a kernel is compiled or interpreted is decided when it is imported.
test: export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/build/torch_extensions
test: $(STAMP)
	[ -n "$(PYTEST_ARGS)" ] || TRITON_INTERPRET=1 $(BIN)/pytest -q -n 2 tests/interpreted
	$(BIN)/pytest -n 2 $(PYTEST_ARGS)

# Skipped, with the reason, where Slurm, munge or namespaces are missing.
test-cluster: export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/build/torch_extensions
test-cluster: $(STAMP)
	$(BIN)/pytest -m cluster tests/cluster $(PYTEST_ARGS)

# The same searches as in `make test`, with many more examples.
FUZZ ?= 30
fuzz: export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/build/torch_extensions
fuzz: $(STAMP)
	PEAKD_FUZZ=$(FUZZ) $(BIN)/pytest -n 2 tests/fuzz --timeout 0 $(PYTEST_ARGS)

# A run that is killed, stopped or damaged must end with the losses of one that is not. SEED repeats an earlier search.
chaos: export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/build/torch_extensions
chaos: $(STAMP)
	$(BIN)/python tests/chaos.py --minutes $(if $(filter 0,$(MINUTES)),5,$(MINUTES)) $(if $(SEED),--seed $(SEED))

# A clean clone of the last commit with environments of its own; pictures and output are left in build/walk/.
walk: $(STAMP)
	$(BIN)/python tools/walk.py $(WALK_ARGS)

$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install -c constraints.txt -e '.[bench]'
	@touch $@

# CASES="mrpc_n1 mrpc_n3"; MINUTES=0 for no limit; see benchmarks/README.md. Reads GLUE from PEAKD_DATA_DIR, or the hub.
bench: $(BENCH_STAMP)
	$(BIN)/peakd-demo --out demo
	$(BIN)/python benchmarks/bench_train.py $(if $(CASES),--cases '$(CASES)') --minutes $(MINUTES) $(BENCH_ARGS)

bench-scaling: $(BENCH_STAMP)
	$(BIN)/peakd-demo --out demo
	$(BIN)/python benchmarks/bench_scaling.py $(BENCH_ARGS)

bench-loss: $(STAMP)
	$(BIN)/python benchmarks/bench_loss.py

checks: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy peakd_ds kernels ds_configs

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
