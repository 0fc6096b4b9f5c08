# Each target does its own set-up in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: help setup demo test test-all lint docs bench certs clean
help:
	@echo "make demo      train a federation on the embedded digits: FedAvg against proxies, with a picture report"
	@echo "make test      the quick tests"
	@echo "make test-all  all tests, the slow ones too"
	@echo "make lint      ruff, mypy and the import contracts of pyproject.toml"
	@echo "make docs      the documentation site, in site/index.html"
	@echo "make certs     keys and certificates for deploy/compose.yaml; HOSTS='fl.example.org' for names of this machine"
	@echo "make bench-NAME  a benchmark of benchmarks/NAME (codec, federated, rivals, speed, scale); writes benchmarks/results/NAME.json"

setup: $(VENV)/.ready

# torch comes first and alone: where pip is configured with a CPU build of it, that one is taken.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("error: python=%d.%d is not usable: expected 3.11 or newer" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,docs,bench,examples]'
	@touch $@

demo: setup
	$(BIN)/tofu demo

test: setup
	$(BIN)/python -m pytest -q -n auto --maxprocesses=8 --dist loadfile $(PYTEST_FLAGS)

test-all: setup
	$(BIN)/python -m pytest -q -n auto --maxprocesses=8 --dist loadfile $(PYTEST_FLAGS) -m 'slow or not slow'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open site/index.html"

bench-%: setup
	$(BIN)/python -m benchmarks.$*

# Names under which SuperNodes on other machines reach this one.
HOSTS ?=
NODES := node-0 node-1 node-2
# Keys need the package cryptography only: from .venv if there is one, and from a small environment otherwise.
KEYS := $(if $(wildcard $(BIN)/python),$(BIN),deploy/.venv/bin)/python
certs:
	@test -x $(KEYS) || { $(PYTHON) -m venv deploy/.venv && $(KEYS) -m pip install --quiet -c constraints.txt cryptography; }
	$(KEYS) -m deploy.certificates deploy/secrets --compose $(NODES:%=--node %) $(HOSTS:%=--host %)

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis
