# Two commands: `make toy` trains and samples a small LLaMA, `make test` runs all tests.
# Each makes .venv by itself. Settings: PYTHON=python3.12; TORCH=2.13.0 (else the newest that was tested),
# which replaces another version in .venv; and on Linux without a GPU
# TORCH_INDEX=https://download.pytorch.org/whl/cpu for a PyTorch of 200 MB instead of several GB.
PYTHON ?= python3
TORCH_WANTED := $(if $(TORCH),torch==$(TORCH),$(shell sed -n 's/^requirements = \(torch[^ ]*\) .*/\1/p' settings.ini))
# Three at a time even on two cores: what waits for other processes leaves a core idle
WORKERS ?= 3
BIN := .venv/bin
SHELL := /bin/bash

.PHONY: help toy test versions torture test-slurm gpu notebooks compiled edit prepare docs clean named FORCE

help:
	@echo 'make toy        train and sample a small LLaMA on the text of your own Python (minutes)'
	@echo 'make test       export, notebooks and tests (minutes)'
	@echo 'make versions   the same with PYTHON=... TORCH=..., noted in benchmarks/versions.md (half an hour)'
	@echo 'make torture    ranks killed at random instants, during saves too, and further sizes, layouts and modes (long)'
	@echo 'make test-slurm a batch job on a real one-node Slurm, preempted and requeued (root on Debian or Ubuntu; minutes)'
	@echo 'make gpu        on a machine with GPUs: the tests that need one, benchmarks, tables in benchmarks/gpu (half an hour, twenty minutes more with several; PARTS="graphs sync"; on a slow machine PATIENCE=2)'
	@echo 'make edit       the notebooks in Jupyter Lab'
	@echo 'make prepare    after editing a notebook: clean, export, pictures, README'
	@echo 'make docs       the site in _docs, with search and an index of all names (a minute; needs no PyTorch)'
	@echo 'make clean      remove .venv and what the tools leave behind; runs/ stays'
	@echo 'With any of them: PYTHON=python3.12 (for a new .venv), TORCH=2.13.0, TORCH_INDEX=https://download.pytorch.org/whl/cpu'

toy: .venv/installed
	$(BIN)/llama-nb toy --out runs/toy

# Each file in one process, so that its fixtures are made once
test: notebooks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(WORKERS) --dist loadfile --no-loadscope-reorder

versions: .venv/installed-test
	$(BIN)/python tools/versions.py

torture: .venv/installed-test
	$(BIN)/python -m pytest tests/torture.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m variant

test-slurm: .venv/installed-test
	$(BIN)/python -m pytest -rP tests/slurm.py

gpu: .venv/installed-test
	$(BIN)/python benchmarks/gpu.py $(if $(PARTS),--parts $(PARTS)) $(if $(PATIENCE),--patience $(PATIENCE))

notebooks: compiled
	OMP_NUM_THREADS=1 $(BIN)/python tools/pages.py --n_workers $(WORKERS)

# Tests and pages start the package some hundred times; where bytecode may not be written by the way
# (PYTHONDONTWRITEBYTECODE), each time would compile it anew
compiled: .venv/installed-test
	@$(BIN)/python -m compileall -qq -j 0 llama_nb benchmarks tests tools || true

edit: .venv/installed-dev
	$(BIN)/jupyter lab nbs

prepare: .venv/installed-test
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python tools/pictures.py
	$(BIN)/python tools/readme.py

docs: .venv/installed-docs
	$(BIN)/python tools/docs.py

clean:
	rm -rf .venv _docs _proc build dist *.egg-info .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'llama_nb needs Python 3.11 or later; say which: make PYTHON=python3.11 ...'; exit 1; }
	@$(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo 'could not make .venv; on Debian and Ubuntu first: apt install python3-venv'; exit 1; }

# The Python that was named is the one of .venv, or nothing is done
named: .venv/bin/python
	@[ '$(origin PYTHON)' = file ] || [ "$$($(PYTHON) -V)" = "$$($(BIN)/python -V)" ] || \
	  { echo ".venv has $$($(BIN)/python -V), $(PYTHON) is $$($(PYTHON) -V): make clean, then again"; exit 1; }

# The version of torch that was last named; a new one makes the steps below run again
.venv/torch: FORCE | named
	@[ -f $@ ] || touch $@
	@[ -z '$(TORCH)' ] || [ '$(TORCH)' = "$$(cat $@)" ] || echo '$(TORCH)' > $@

SITE := $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# pip compiles what it installs, 14,000 modules for the tests, on one core: half of its time.
# So that is done beside it, on all cores; files that are no Python of this version stay as they are
define install
@echo "installing into .venv: $(TORCH_WANTED) and what else $(1) needs"
@$(if $(TORCH_INDEX),$(BIN)/pip install -q --no-compile --index-url '$(TORCH_INDEX)' '$(TORCH_WANTED)')
@$(BIN)/pip install -q --no-compile -e '$(1)' '$(TORCH_WANTED)'
@$(BIN)/python -m compileall -qq -j 0 $(SITE) || true
endef

.venv/installed: .venv/torch settings.ini setup.py
	$(call install,.)
	@touch $@

.venv/installed-test: .venv/torch settings.ini setup.py
	$(call install,.[test])
	@touch .venv/installed .venv/installed-docs $@

.venv/installed-dev: .venv/torch settings.ini setup.py
	$(call install,.[dev])
	@touch .venv/installed .venv/installed-docs .venv/installed-test $@

# The site reads notebooks and modules and runs nothing, so it needs neither the package nor PyTorch
.venv/installed-docs: settings.ini setup.py | named
	@echo "installing into .venv: what the site needs"
	@$(BIN)/pip install -q $$(sed -n 's/^docs_requirements = //p' settings.ini)
	@touch $@
