PYTHON ?= python3.11
VENV := .venv/bin

.PHONY: demo test lint

# A few epochs on the embedded sample, then inference; needs no network once installed.
demo: .venv/installed
	$(VENV)/python MNIST/TWTA_4_4_MNIST.py --dataset digits --resume False --learning_rate 0.001 --batch_size 50 --epochs 12 --mode training
	$(VENV)/python MNIST/TWTA_4_4_MNIST.py --dataset digits --resume True --mode inference

test: .venv/installed
	$(VENV)/python -m pytest -n 2

lint: .venv/installed
	$(VENV)/ruff check .

.venv/installed: requirements.txt pyproject.toml
	@echo "installing into .venv: TensorFlow and what it needs, 2.5 GB on disk; a few minutes"
	@$(PYTHON) -m venv .venv
	$(VENV)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
