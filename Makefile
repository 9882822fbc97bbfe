# make demo   export the example model, generate text with it, print a latency table
# make test   run the tests
# make real-model   fetch SmolLM2, which some tests use, into build/; the tests do so too
# make fuzz   run the fuzzers with CASES cases each, 5000 by default
# make lint   run the linters and the type checker
# make gpu    prove and measure on this machine's GPU, see docs/gpu.md; GPU_FLAGS="--budget 540 --only model-int4", ...
# make wheel  make the wheel in dist/, which is all that a board needs
# make test-jetson   run the tests that need a GPU and TensorRT, with JetPack's own Python packages visible
# All set-up happens here, in .venv; PYTHON chooses the interpreter (3.11 or later: ONNX Runtime needs it; on a board,
# for test-jetson, JetPack's own). make gpu takes the machine as it is and sets nothing up: it runs under PYTHON where
# that is given, else under .venv's Python where there is one, else under python3.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# torch comes first and pinned: what depends on it then takes it as it is
TORCH  := torch==2.13.0
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO   := demo

CUDA_MAJOR ?= $(shell $(PYTHON) -c 'import sys; print(12 if sys.version_info < (3, 11) else 13)')
NVRTC_12   := 'nvidia-cuda-nvrtc-cu12==12.6.*'
NVRTC_13   := 'nvidia-cuda-nvrtc==13.0.*'
BUNDLES    ?= build/test-bundles

CASES      ?= 5000

GPU_PYTHON := $(if $(filter file default undefined,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON))

.PHONY: demo test real-model fuzz gpu test-jetson wheel lint format clean

demo: $(VENV)/.demo
	rm -rf $(DEMO) && mkdir $(DEMO)
	$(BIN)/gta-edge export examples/tiny-gta $(DEMO)/tiny-gta
	$(BIN)/gta-edge inspect $(DEMO)/tiny-gta
	$(BIN)/gta-edge generate $(DEMO)/tiny-gta --prompt 'def __init__(self, ' --max-new-tokens 72
	$(BIN)/gta-edge bench $(DEMO)/tiny-gta --contexts 16,128,512,960 --new-tokens 16 --rounds 3

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile

real-model: $(VENV)/.dev
	@test -e build/smollm2/config.json || $(BIN)/python scripts/fetch_smollm2.py

fuzz: $(VENV)/.dev
	GTA_EDGE_FUZZ_CASES=$(CASES) $(BIN)/python -m pytest -n auto --dist worksteal tests/fuzz

gpu:
	@$(GPU_PYTHON) scripts/gpu_campaign.py $(GPU_FLAGS)

# Left out are modules that import what a board need not have, such as torch; other plugins of pytest (ROS has some) too.
test-jetson: $(VENV)/.jetson
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(if $(wildcard $(BUNDLES)),GTA_EDGE_TEST_BUNDLES=$(BUNDLES)) \
	  $(BIN)/python -m pytest -m 'gpu or tensorrt' $$($(BIN)/python scripts/board_tests.py)

wheel: | $(VENV)/bin/python
	rm -f dist/gta_edge-*.whl
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist/gta_edge-*.whl

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# TensorRT is not on PyPI for a board: it comes with JetPack, for JetPack's own Python, which is 3.10 where CUDA is 12.
# NVRTC is no newer than the driver's CUDA: 12.6 in JetPack 6.2, 13.0 and later in 7.
$(VENV)/.jetson: pyproject.toml
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(PIP) --editable '.[test,tensorrt,cuda$(CUDA_MAJOR)]' $(NVRTC_$(CUDA_MAJOR))
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11, which ONNX Runtime needs; run: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(PIP) $(TORCH)
	$(PIP) --editable '.[export,ort]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(PIP) $(TORCH)
	$(PIP) --editable '.[dev]'
	@touch $@
