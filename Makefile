# Two commands on a fresh machine with Python 3.11:
#   make quickstart   set up .venv, then train the embedded base on the shipped tickets, to the end
#   make test         set up .venv, then every test

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_CONSTRAINT = $(CURDIR)/constraints.txt
export DEBIAN_FRONTEND = noninteractive

.PHONY: quickstart test check ui setup export-tools chromium clean

quickstart: $(READY)
	$(BIN)/studio run recipes/quickstart.yaml --overwrite

test: $(READY) chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: $(READY)
	$(BIN)/studio ui

setup: $(READY)

# torch first and alone: the plain CPU build satisfies the others' ranges, so nothing pulls another one in
$(READY): constraints.txt pyproject.toml export-tools.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch
	$(BIN)/python -m pip install -q -e '.[dev]'
	$(BIN)/python -m pip install -q --no-deps --require-hashes -r export-tools.txt
	touch $(READY)

# what GGUF exports need, pinned by hash; setup installs it too. Without make: the same pip command
export-tools:
	$(BIN)/python -m pip install -q --no-deps --require-hashes -r export-tools.txt

# the browser tests need a Chromium; Debian's is installed where that is possible, elsewhere they say they were skipped
chromium:
	@command -v chromium >/dev/null 2>&1 || test -n "$$STUDIO_CHROMIUM" || { \
	  test "$$(id -u)" = 0 && command -v apt-get >/dev/null 2>&1 \
	    && (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium) >/dev/null 2>&1; } \
	  || echo "no chromium: the browser tests will be skipped; install Debian's package 'chromium' to run them"

clean:
	rm -rf $(VENV) build *.egg-info
