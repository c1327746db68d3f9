# make demo   train spatialmamba_micro on handwritten digits, evaluate the checkpoint in a second process, draw both
# make test   run the tests
# make lint   run ruff, as CI does
# Each starts from a bare checkout: it makes .venv, installs, and runs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed

DIGITS ?= data/digits
OUTPUT ?= output
RUN := $(OUTPUT)/spatialmamba_micro/digits

# The tensors of the demo and the tests are small: a second thread is only waited for, the tests use two processes.
export OMP_NUM_THREADS ?= 1
PYTEST_ARGS ?= -n 2

.PHONY: install demo test lint clean

install: $(INSTALLED)

# Two steps: the kernels are compiled against the PyTorch that the first one installs.
$(INSTALLED): requirements.txt pyproject.toml $(wildcard kernels/*/pyproject.toml kernels/*/setup.py kernels/*/csrc/*.h kernels/*/csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install -e kernels/selective_scan -e kernels/dwconv2d -e .
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m classification.data.digits $(DIGITS)
	$(BIN)/python classification/main.py --cfg classification/configs/spatialmamba/spatialmamba_micro_digits.yaml \
		--data-path $(DIGITS) --output $(OUTPUT) --tag digits
	$(BIN)/python classification/main.py --cfg classification/configs/spatialmamba/spatialmamba_micro_digits.yaml \
		--data-path $(DIGITS) --output $(OUTPUT) --tag digits --pretrained $(RUN)/best.pth
	$(BIN)/python -m classification.report $(RUN) --data-path $(DIGITS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info kernels/*/*.egg-info kernels/*/build kernels/*/*/*.so
