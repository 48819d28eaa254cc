# make run    set up everything and run the main job on the built-in task  (ARGS="--seed 1" adds arguments)
# make test   set up everything and run the tests, two files at a time     (ARGS="-n 0 -k resume": one process, some)
#             MCORE=0.19.2 (also with run, smoke): with that megatron-core, in an environment of its own
#             TORCH_INDEX=URL (at the first make): torch and what it needs from that index, as its CPU build
# make smoke  every stage in a minute     make lint  style and types     make setup  only the environment, in .venv
# make kernel-report  compile every kernel for an H100 (no GPU needed)     make gpu-check  kernels and a bf16 run on a GPU
# make fuzz   mutated files of every kind at every command, ten minutes; seeds nobody tried (ARGS="--seconds 3600")
# make cluster-test  the SLURM script on a SLURM of this machine's own (Debian, root; installs its packages), all checks
# make kill-test  kills, signals, lost and full disks, flipped bytes: counted  (ARGS="--rounds 50")
# make clean  remove the environments and caches; runs/ stays

PYTHON ?= python3
NPROC ?= 2
ARGS ?=
MCORE ?=
TORCH_INDEX ?=

VENV := .venv$(MCORE:%=-mcore-%)
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
# One thread for each of several processes that share the CPU, unless the user says otherwise.
OMP_NUM_THREADS ?= 1
TORCHRUN := OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/python -m mstar_mega.launch --standalone --nproc-per-node

.PHONY: setup run smoke test lint fuzz cluster-test kill-test kernel-report gpu-check clean
.DEFAULT_GOAL := run

setup: $(STAMP)

# Over the pinned one, whatever its metadata says: from 0.17 on that is Python 3.12, and the files run under 3.11 too.
PIP_OVER := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --ignore-requires-python

# torch first: its dependencies bring the setuptools that builds this package, so nothing is downloaded twice.
$(STAMP): setup.py constraints.txt mstar_mega/__init__.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 10) <= v < (3, 14) and \
	    "make setup: $(PYTHON) is Python %d.%d, but 3.10 to 3.13 is needed: make setup PYTHON=python3.12" % v[:2] or \
	    sys.platform != "linux" and "make setup: megatron-core has wheels for Linux only; use a container or WSL" or 0)'
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt $(TORCH_INDEX:%=--index-url %) torch==2.13.0
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	$(if $(MCORE),$(PIP_OVER) 'megatron-core==$(MCORE)')
	@touch $@

run: $(STAMP)
	$(TORCHRUN) $(NPROC) examples/pretrain_mstar.sh $(ARGS)

smoke: $(STAMP)
	$(TORCHRUN) 1 examples/pretrain_mstar.sh --config examples/configs/smoke.yaml $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(NPROC) --dist loadfile --no-loadscope-reorder $(ARGS)

fuzz: $(STAMP)
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m fuzz.run $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

cluster-test: $(STAMP)
	bash tests/cluster/install.sh
	MSTAR_CLUSTER=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -s tests/cluster $(ARGS)

kill-test: $(STAMP)
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m kills $(ARGS)

kernel-report: $(STAMP)
	TRITON_INTERPRET=0 TRITON_DEFAULT_FP_FUSION=1 $(BIN)/python -m mstar_mega.kernels.report --out docs/kernel_report.md

# On one GPU, less than eight minutes: kernels against their definitions, every stage of the job in bfloat16, and speed.
# What it finds is left in benchmarks/results/gpu_check.json, to commit.  (ARGS=--rehearse: the same steps without a GPU)
gpu-check: $(STAMP)
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

clean:
	rm -rf .venv .venv-mcore-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
