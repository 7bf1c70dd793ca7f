# Everything a user types. `make help` lists it.

MODEL ?= dinov2_s
RECIPE ?= int8
WEIGHTS ?= auto
MODULE ?=
INPUT ?=
IMG_SIZE ?=
CALIB ?=
EVAL ?=
TARGET ?= auto
SM ?=
BUILDER ?=
FLOAT ?= fp16
BATCH ?= 8
MAX_BATCH ?= 32
OUT ?= artifacts
DEVICE ?= auto
GPU ?= A10
CACHE ?= on
FROM ?=
UNTIL ?=
PAPER ?= qwt
IMAGENET ?=
MODELS ?=
CALIB_IMAGES ?=
EVAL_IMAGES ?=
FILTER ?=
REPO ?= models
MAX_DROP ?=
MIN_SPEEDUP ?=
LABELS ?=
PACKAGES ?=
FILES ?=
ALLOW ?=

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
VENV_SERVE := .venv-serve
VENV_TRITON := .venv-triton
SIZE = $(if $(INPUT)$(IMG_SIZE),--input "$(if $(INPUT),$(INPUT),$(IMG_SIZE))")
# In the order of testpaths, which has the long files first: else xdist starts those of few tests last, and some take a minute.
PYTEST_SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder
# What to install: by the newest CUDA that the NVIDIA driver runs, which is asked each time, as a GPU may come later.
CUDA := $(shell nvidia-smi 2>/dev/null | sed -nE 's/.*CUDA [A-Za-z ]*Version: *([0-9]+).*/\1/p')
REQUIREMENTS := $(if $(CUDA),$(if $(filter 12,$(CUDA)),requirements-gpu-cuda12.txt,requirements-gpu.txt),requirements.txt)
READY := $(VENV)/.ready-$(basename $(REQUIREMENTS))
HEADERS := $(VENV)/cuda-headers

.PHONY: help setup setup-pycuda engine verify explain report doctor structure serve-repo serve test test-fast lint bench coverage photographs table clean clean-cache
.DEFAULT_GOAL := help

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

$(READY): requirements-base.txt $(REQUIREMENTS)
	@echo "setting up $(VENV) with $(REQUIREMENTS) ($(if $(CUDA),an NVIDIA driver for CUDA $(CUDA) is present,no NVIDIA driver found))"
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, this is %d.%d: set PYTHON=" % v)'
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check --requirement $(REQUIREMENTS)
	@touch $@

$(VENV)/.ready-dev: $(READY) requirements-dev.txt
	@$(RUN) -m pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	@touch $@

setup: $(READY) ## Create the virtual environment (done by the other targets)

# It compiles against the headers of CUDA 13, which wheels hold, and links to the library of a driver for CUDA 13.
setup-pycuda: $(READY) ## Compile PyCUDA on a GPU host: engines then run through it instead of cuda-bindings
	@ldconfig -p | grep -q 'libcuda\.so\.1 ' || { echo "error: no NVIDIA driver (libcuda.so.1): PyCUDA is for a GPU host" >&2; exit 2; }
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(HEADERS) nvidia-cuda-runtime==13.2.86 \
	  nvidia-cuda-profiler-api==13.5.25 nvidia-curand==10.4.5.25 nvidia-cuda-crt==13.5.37
	@ln -sf "$$(ldconfig -p | sed -n 's/.*libcuda.so.1 .*x86-64.*=> //p' | head -n 1)" $(HEADERS)/libcuda.so
	@ln -sf $(abspath $(HEADERS))/nvidia/cu13/lib/libcurand.so.10 $(HEADERS)/libcurand.so
	@CPATH=$(abspath $(HEADERS))/nvidia/cu13/include LIBRARY_PATH=$(abspath $(HEADERS)) \
	  LDFLAGS=-Wl,-rpath,$(abspath $(HEADERS))/nvidia/cu13/lib \
	  $(RUN) -m pip install --quiet --disable-pip-version-check --no-cache-dir pycuda==2026.1

engine: $(READY) ## Build a verified INT8 engine: MODEL= (or MODULE=) INPUT= WEIGHTS= CALIB= EVAL= CALIB_IMAGES= RECIPE= TARGET= SM= BUILDER= FLOAT= BATCH= MAX_BATCH= MAX_DROP= MIN_SPEEDUP= DEVICE= OUT= CACHE= FROM= UNTIL=
	@$(RUN) -m deploy engine --model "$(MODEL)" $(if $(MODULE),--module "$(MODULE)") $(SIZE) --weights "$(WEIGHTS)" --calib "$(CALIB)" --eval "$(EVAL)" \
	  $(if $(CALIB_IMAGES),--calib-images "$(CALIB_IMAGES)") --recipe "$(RECIPE)" --target "$(TARGET)" $(if $(SM),--sm "$(SM)") $(if $(BUILDER),--builder "$(BUILDER)") --float "$(FLOAT)" --batch "$(BATCH)" --max-batch "$(MAX_BATCH)" --device "$(DEVICE)" \
	  --out "$(OUT)" --cache "$(CACHE)" $(if $(MAX_DROP),--max-drop="$(MAX_DROP)") \
	  $(if $(MIN_SPEEDUP),--min-speedup="$(MIN_SPEEDUP)") $(if $(FROM),--from "$(FROM)") $(if $(UNTIL),--until "$(UNTIL)")

verify: $(READY) ## Check a finished package again: MODEL= (or MODULE=) WEIGHTS= RECIPE= OUT= as for engine
	@$(RUN) -m deploy verify --model "$(MODEL)" $(if $(MODULE),--module "$(MODULE)") --weights "$(WEIGHTS)" --recipe "$(RECIPE)" --out "$(OUT)"

explain: $(READY) ## Where the time of a package's engine goes, and why INT8 is hardly faster: GPU= BATCH=, and as for verify
	@$(RUN) -m deploy explain --model "$(MODEL)" $(if $(MODULE),--module "$(MODULE)") --weights "$(WEIGHTS)" --recipe "$(RECIPE)" --out "$(OUT)" \
	  --gpu "$(GPU)" --batch "$(BATCH)"

report: $(READY) ## Write a finished package as one page and as a model card, int8.report.html and int8.MODEL_CARD.md beside its folder: as for verify
	@$(RUN) -m deploy report --model "$(MODEL)" $(if $(MODULE),--module "$(MODULE)") --weights "$(WEIGHTS)" --recipe "$(RECIPE)" --out "$(OUT)"

doctor: $(READY) ## What is installed, which backends build and run, what is missing
	@$(RUN) -m deploy doctor

structure: $(READY) ## What a network consists of, and what stays in float and why: MODEL= (or MODULE= INPUT= CALIB=)
	@$(RUN) -m deploy structure "$(MODEL)" $(if $(MODULE),--module "$(MODULE)") $(SIZE) $(if $(CALIB),--calib "$(CALIB)")

$(VENV_SERVE)/.ready: requirements-serve.txt
	@$(PYTHON) -m venv $(VENV_SERVE)
	@$(VENV_SERVE)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-serve.txt
	@touch $@

$(VENV_TRITON)/.ready: requirements-triton.txt
	@$(PYTHON) -m venv $(VENV_TRITON)
	@$(VENV_TRITON)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-triton.txt
	@touch $@

serve-repo: $(VENV_SERVE)/.ready ## Write a package as a Triton model repository: MODEL= (or MODULE=) WEIGHTS= RECIPE= OUT= as for engine, or PACKAGES= of several models, REPO= LABELS= FILES= ALLOW='sample-calibration random-weights unexecuted'
	@$(VENV_SERVE)/bin/python -m deploy serve-repo $(PACKAGES) --model "$(MODEL)" $(if $(MODULE),--module "$(MODULE)") --weights "$(WEIGHTS)" \
	  --recipe "$(RECIPE)" --out "$(OUT)" --repo "$(REPO)" $(if $(LABELS),--labels "$(LABELS)") $(foreach each,$(FILES),--file "$(each)") $(foreach each,$(ALLOW),--allow-$(each))

serve: $(VENV_SERVE)/.ready $(VENV_TRITON)/.ready ## Run a Triton server without a GPU on loopback, for the _cpu models of REPO=
	@$(VENV_SERVE)/bin/python -m deploy serve --repo "$(REPO)" --environment $(VENV_TRITON)

test: $(VENV)/.ready-dev ## Run every test (two real networks through the whole pipeline)
	@$(PYTEST_SIDE_BY_SIDE) -m "not alone"
	@$(RUN) -m pytest -m alone

test-fast: $(VENV)/.ready-dev ## Run the tests of parts: no network goes through the whole pipeline
	@$(PYTEST_SIDE_BY_SIDE) -m "not slow"

lint: $(VENV)/.ready-dev ## Style and types
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

bench: $(READY) ## Measure the reference models and write benchmarks/results/
	@$(RUN) -m benchmarks.engines
	@$(RUN) -m benchmarks.readme

coverage: $(READY) ## Take the smallest networks of every file of timm through the pipeline: FILTER='vit_* resnet18'
	@$(RUN) -m benchmarks.coverage $(foreach pattern,$(FILTER),'$(pattern)')

photographs: $(READY) ## Fetch photographs to calibrate and judge on, where no data set is at hand
	@$(RUN) -m benchmarks.photographs photographs

table: $(READY) ## A paper's table beside this tool's simulation: PAPER= IMAGENET= (or CALIB= EVAL=) MODELS= CALIB_IMAGES= EVAL_IMAGES= CACHE=
	@$(RUN) -m benchmarks.tables --paper "$(PAPER)" --imagenet "$(IMAGENET)" --calib "$(CALIB)" --eval "$(EVAL)" \
	  --models "$(MODELS)" --cache "$(CACHE)" \
	  $(if $(CALIB_IMAGES),--calib-images "$(CALIB_IMAGES)") $(if $(EVAL_IMAGES),--eval-images "$(EVAL_IMAGES)")

clean-cache: $(READY) ## Remove what is kept in the user's cache: states of stages, downloads, environments of tests
	@$(RUN) -m deploy clean-cache

clean: ## Remove the virtual environments, artifacts and the caches of this checkout
	rm -rf $(VENV) $(VENV_SERVE) $(VENV_TRITON) artifacts .pytest_cache .mypy_cache .ruff_cache
