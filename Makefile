# make run: train the quickstart. make test: the fast tests. make test-all: all of them. Each makes .venv if needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin/python
WORKDIR ?= runs/quickstart
PIP_INSTALL = $(BIN) -m pip install --quiet --disable-pip-version-check -c constraints.txt
# libtpu looks for a TPU's metadata server; the tests compile for topologies that aren't here, on the CPU.
QUIET_TPU = JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost

.PHONY: run test test-all clean
.DEFAULT_GOAL := help

help:
	@head -1 Makefile | cut -c3-

run: $(VENV)/installed
	$(BIN) -m experiments.train --config=quickstart --workdir=$(WORKDIR)

test: $(VENV)/installed-test
	$(QUIET_TPU) $(BIN) -m pytest -n 2 -q -m "not slow" tests

test-all: $(VENV)/installed-test
	$(QUIET_TPU) $(BIN) -m pytest -n 2 -q --durations=15 tests

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	@echo "installing into $(VENV) (a minute or two, once)"
	@test -x $(BIN) || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@echo "installing what the tests need"
	@$(PIP_INSTALL) -e ".[test]"
	@if [ "$$(uname -s)" = Linux ]; then $(PIP_INSTALL) -e ".[tpu]"; fi
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
