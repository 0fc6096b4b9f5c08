# Each target does its own set-up in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: help setup demo test test-containers test-all lint docs bench certs clean
help:
	@echo "make demo      train a federation on the embedded digits: FedAvg against proxies, with a picture report"
	@echo "make test      the quick tests"
	@echo "make test-all  all tests, the slow ones too"
	@echo "make test-containers  deploy/compose.yaml on a Docker engine"
	@echo "make lint      ruff, mypy and the import contracts of pyproject.toml"
	@echo "make docs      the documentation site, in site/index.html"
	@echo "make certs     keys and certificates for deploy/compose.yaml; HOSTS='fl.example.org' for names of this machine"
	@echo "make bench-NAME  a benchmark of benchmarks/NAME (codec, federated, rivals, speed, scale); writes benchmarks/results/NAME.json"

setup: $(VENV)/.ready

# uv installs in parallel, shows its progress, and takes files from its cache without a copy. Where it cannot (its index
# is not that of pip's configuration, say), pip does the same. Packages that pip is configured to find in a folder, such
# as a CPU build of torch, are found by both.
LINKS = $$($(BIN)/python -m pip config get :env:.find-links 2>/dev/null || $(BIN)/python -m pip config get global.find-links 2>/dev/null)
INSTALL = install() { \
	UV_FIND_LINKS="$(LINKS)" $(BIN)/uv pip install --python $(BIN)/python -c constraints.txt "$$@" || \
	{ echo "uv could not install this; pip does it now, which takes minutes"; \
	  $(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt "$$@"; }; }; install

# What `make demo` needs comes first, and alone.
$(VENV)/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("error: python=%d.%d is not usable: expected 3.11 or newer" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@echo "[1/3] an environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt uv
	@echo "[2/3] tofu-fl and what it needs, torch above all (about 1.5 GB on disk with a CPU build of torch)"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.ready: $(VENV)/.core
	@echo "[3/3] optional packages, and the tools of tests, documentation and benchmarks (about 1 GB)"
	@$(INSTALL) -e '.[dev,docs,bench,examples]'
	@touch $@

demo: $(VENV)/.core
	$(BIN)/tofu demo

# Files go to the workers in the order of the tree, the hundreds of small ones at its end: otherwise those with the fewest
# tests come last, which are the longest, and the other workers wait for them.
PYTEST = $(BIN)/python -m pytest -q -n auto --maxprocesses=8 --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

test: setup
	$(PYTEST)

# An engine must run: DOCKER_HOST, or the one that `tests/deploy/engine/start.sh FOLDER` starts.
test-containers: setup
	TOFU_CONTAINERS=1 $(BIN)/python -m pytest -q -rs tests/deploy/test_containers.py

test-all: setup
	$(PYTEST) -m 'slow or not slow'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open site/index.html; with search: python3 -m http.server --bind 127.0.0.1 --directory site, then http://127.0.0.1:8000"

bench-%: setup
	$(BIN)/python -m benchmarks.$*

# Names under which SuperNodes on other machines reach this one.
HOSTS ?=
NODES := node-0 node-1 node-2
# Keys need the packages cryptography and typer only: from .venv if there is one, and from a small environment otherwise.
KEYS := $(if $(wildcard $(BIN)/python),$(BIN),deploy/.venv/bin)/python
certs:
	@test -x $(KEYS) || { echo "making deploy/.venv, with the packages cryptography and typer"; $(PYTHON) -m venv deploy/.venv && $(KEYS) -m pip install --quiet -c constraints.txt cryptography typer; }
	$(KEYS) -m deploy.certificates deploy/secrets --compose $(NODES:%=--node %) $(HOSTS:%=--host %)

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis
