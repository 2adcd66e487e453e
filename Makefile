# The first Python found that TensorFlow supports; `make PYTHON=... demo` takes another.
IS_FIT := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10; do \
    $$python -c '$(IS_FIT)' 2>/dev/null && echo $$python && break; done)
VENV := .venv/bin

.PHONY: demo demo-cluster test slow processors soak lint report reproduce-table pdf

# Trains 12 epochs on scikit-learn's digits, then runs inference; downloads nothing after the installation.
demo: .venv/installed
	$(VENV)/python MNIST/TWTA_4_4_MNIST.py --dataset digits --resume False --learning_rate 0.001 --batch_size 50 --epochs 12 --mode training
	$(VENV)/python MNIST/TWTA_4_4_MNIST.py --dataset digits --resume True --mode inference

# Trains on the digits in two processes of one thread, which sum their gradients in every step; under a minute.
PAIR := TF_NUM_INTRAOP_THREADS=1 TF_NUM_INTEROP_THREADS=1 $(VENV)/python MNIST/TWTA_4_4_MNIST.py --dataset digits \
	--learning_rate 0.001 --batch_size 50 --epochs 12 --run_dir runs/demo-cluster \
	--workers 127.0.0.1:47110,127.0.0.1:47111
demo-cluster: .venv/installed
	@$(PAIR) --task 1 2>&1 | sed 's/^/                                        worker 1: /' & \
	$(PAIR) --task 0; code=$$?; wait; exit $$code

# Two test processes with one TensorFlow thread each: with more they would wait for each other on two cores.
PYTEST := TF_NUM_INTRAOP_THREADS=1 TF_NUM_INTEROP_THREADS=1 $(VENV)/python -m pytest -n 2
test: .venv/installed
	$(PYTEST)

# Tests of half a minute and more: VGG13 trained, the whole tutorial, a new script, a kill on one core.
slow: .venv/installed
	$(PYTEST) -m slow

# Tests that depend on the processor, under simulated kinds: without oneDNN and with SSE2 only; with AVX2 only, where
# that is not what make test ran on.
processors: .venv/installed
	TF_ENABLE_ONEDNN_OPTS=0 NUMBA_CPU_NAME=x86-64 NUMBA_CPU_FEATURES= $(PYTEST) -m 'processor and not slow'
	@if [ ! -e /proc/cpuinfo ] || grep -q -e avx512f -e avx_vnni /proc/cpuinfo; then \
	    ONEDNN_MAX_CPU_ISA=AVX2 XLA_FLAGS=--xla_cpu_max_isa=AVX2 NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES= \
	    $(PYTEST) -m 'processor and not slow'; \
	else echo 'AVX2 is not simulated: this processor has no more'; fi

# Code, then the documents: tables, links, pictures, PDF.
lint: .venv/installed
	$(VENV)/ruff check .
	$(PYTEST) tests/documents.py

# Kills a training 50 times and resumes it; about 20 minutes.
soak: .venv/installed
	$(VENV)/python tests/soak.py --kills 50

# Writes tables of the pages, figures in docstrings and pictures, all from the records.
report: .venv/installed
	$(VENV)/python -m twta.report

# Evaluates every network in pretrained/ and compares it with its record.
reproduce-table: .venv/installed
	$(VENV)/python -m twta.report --reproduce

# PDF/README.pdf, at a release; nothing else uses its tools.
pdf: .venv/installed
	$(VENV)/pip install --quiet --disable-pip-version-check -r PDF/requirements.txt
	$(VENV)/python PDF/make.py

.venv/installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 to 3.13 found, which TensorFlow needs; install one" >&2; exit 1; }
	@"$(PYTHON)" -c '$(IS_FIT)' 2>/dev/null || { echo "error: PYTHON=$(PYTHON) is not a Python 3.10 to 3.13, which \
	TensorFlow needs; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) lacks the module venv; on Debian \
	and Ubuntu: apt install $(notdir $(PYTHON))-venv" >&2; exit 1; }
	@echo "installing TensorFlow and its dependencies into .venv: 2.5 GB on disk, a few minutes"
	@"$(PYTHON)" -m venv --clear .venv
	$(VENV)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
