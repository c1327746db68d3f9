# make demo             train spatialmamba_micro on handwritten digits, evaluate the checkpoint in a second process, draw both and what it sees
# make demo-detection   train and test Mask R-CNN with that backbone on scenes of handwritten digits, draw what it finds
# make demo-segmentation   the same with UPerNet, single-scale and multi-scale
# make test             run the tests
# make lint             run ruff, as CI does
# Each starts from a bare checkout: it makes .venv, installs, and runs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed
OPENMMLAB := $(VENV)/.openmmlab

# Settings over the demo's config, as after main.py's --opts or the tools' --cfg-options; the tests train and test less.
DEMO_OPTIONS ?=
DEMO_TEST_OPTIONS ?=

DIGITS ?= data/digits
EXPLAINED := 0/0078.png 3/0045.png 8/0028.png
OUTPUT ?= output
RUN := $(OUTPUT)/spatialmamba_micro/digits
SCENES ?= data/digits_scenes
DETECTION := detection/configs/spatialmamba/mask_rcnn_spatialmamba_micro_digits.py
DETECTION_RUN := $(OUTPUT)/mask_rcnn_spatialmamba_micro_digits
SCENES_ADE20K ?= data/digits_scenes_ade20k
SEGMENTATION := segmentation/configs/spatialmamba/upernet_spatialmamba_micro_digits.py
SEGMENTATION_RUN := $(OUTPUT)/upernet_spatialmamba_micro_digits

# The tensors of the demo and the tests are small: a second thread is only waited for, the tests use two processes.
export OMP_NUM_THREADS ?= 1
PYTEST_ARGS ?= -n 2 --dist worksteal

.PHONY: install install-openmmlab demo demo-detection demo-segmentation test lint clean

install: $(INSTALLED)

# Two steps: the kernels are compiled against the PyTorch that the first one installs.
$(INSTALLED): requirements.txt pyproject.toml $(wildcard kernels/*/pyproject.toml kernels/*/setup.py kernels/*/csrc/*.* kernels/*/csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install -e kernels/selective_scan -e kernels/dwconv2d
	touch $@

install-openmmlab: $(OPENMMLAB)

# mmengine imports yapf, which writes a file to ~/.cache at first: of processes that start together, one could read half.
$(OPENMMLAB): $(INSTALLED) requirements-openmmlab.txt requirements-explain.txt $(wildcard classification/openmmlab/mmcv_ext/*)
	$(BIN)/python -m pip install -r requirements-openmmlab.txt
	$(BIN)/python -m pip install --no-deps -r requirements-explain.txt
	$(BIN)/python -c "import yapf"
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m classification.data.digits $(DIGITS)
	$(BIN)/python classification/main.py --cfg classification/configs/spatialmamba/spatialmamba_micro_digits.yaml \
		--data-path $(DIGITS) --output $(OUTPUT) --tag digits $(if $(DEMO_OPTIONS),--opts $(DEMO_OPTIONS))
	$(BIN)/python classification/main.py --cfg classification/configs/spatialmamba/spatialmamba_micro_digits.yaml \
		--data-path $(DIGITS) --output $(OUTPUT) --tag digits --pretrained $(RUN)/best.pth
	$(BIN)/python -m classification.report $(RUN) --data-path $(DIGITS)
	$(BIN)/python -m classification.explain $(RUN)/best.pth $(addprefix $(DIGITS)/val/,$(EXPLAINED)) --out $(RUN)

# The tools take `python` from the PATH, as in an environment that is active. With --resume a second `make` goes on with
# the run that is there, as main.py does, and tests it.
demo-detection demo-segmentation: export PATH := $(BIN):$(PATH)
demo-detection: $(OPENMMLAB)
	python -m classification.data.digits_scenes $(SCENES)
	bash detection/tools/dist_train.sh $(DETECTION) 2 --work-dir $(DETECTION_RUN) --resume \
		--cfg-options data_root=$(SCENES)/ $(DEMO_OPTIONS)
	bash detection/tools/dist_test.sh $(DETECTION) $$(cat $(DETECTION_RUN)/last_checkpoint) 1 --work-dir $(DETECTION_RUN)/test \
		--show-dir $(abspath $(DETECTION_RUN))/predictions --cfg-options data_root=$(SCENES)/ $(DEMO_TEST_OPTIONS)

demo-segmentation: $(OPENMMLAB)
	python -m classification.data.digits_scenes $(SCENES_ADE20K) --layout ade20k
	bash segmentation/tools/dist_train.sh $(SEGMENTATION) 2 --work-dir $(SEGMENTATION_RUN) --resume \
		--cfg-options data_root=$(SCENES_ADE20K)/ $(DEMO_OPTIONS)
	bash segmentation/tools/dist_test.sh $(SEGMENTATION) $$(cat $(SEGMENTATION_RUN)/last_checkpoint) 1 \
		--work-dir $(SEGMENTATION_RUN)/test --show-dir $(SEGMENTATION_RUN)/predictions --cfg-options data_root=$(SCENES_ADE20K)/ \
		$(DEMO_TEST_OPTIONS)
	bash segmentation/tools/dist_test.sh $(SEGMENTATION) $$(cat $(SEGMENTATION_RUN)/last_checkpoint) 1 --tta \
		--work-dir $(SEGMENTATION_RUN)/test_tta --cfg-options data_root=$(SCENES_ADE20K)/ $(DEMO_TEST_OPTIONS)

test: $(OPENMMLAB)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info kernels/*/*.egg-info kernels/*/build \
		kernels/*/*/*.so kernels/*/*/_not_compiled.txt classification/openmmlab/mmcv_ext/build \
		classification/openmmlab/mmcv_ext/*.egg-info
