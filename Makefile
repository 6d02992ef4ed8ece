# make demo                     the whole ALLO pipeline on the embedded model; prints a table
# make test                     installs what is missing and runs the test suite
# make test-gpu                 the kernels compiled and training, on a GPU (skipped without one)
# make test-long                the slow proofs: kills, damaged files by the thousand, more processes
# make bench                    times the kernels: BENCH_ARGS="masked_adamw --size full"
# make lint types imports       what .ci/run checks besides
# make audit                    dependencies and their reasons, bill of materials, known holes
# make demo TORCH_INDEX=URL     torch from another index of wheels, for example
#                               https://download.pytorch.org/whl/cpu (make clean to change it later)
# make PYTHON=python3.12 ...    another interpreter: 3.11 to 3.13

PYTHON ?= python3
TORCH_INDEX ?=
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
VIEW := build/checks
REQUIREMENTS := pyproject.toml constraints.txt
OLD_TRITON := build/triton-3.6.0
SPREAD := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
PIP_AUDIT := build/pip-audit

.PHONY: help venv install install-dev demo test test-main test-interpreted test-compiled test-gpu test-long test-long-main test-long-kernels bench lint types imports audit view clean

help:
	@sed -n '/^# make/,/^$$/s/^# //p' $(firstword $(MAKEFILE_LIST))

venv: $(BIN)/python

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

demo: $(VENV)/.installed
	$(BIN)/lit-align allo --config configs/demo.yaml

# Three runs of pytest at the same time, since Triton's interpreter and its compiler do not share a
# process; what each says is printed when it ends.
test: $(VENV)/.installed-dev
	$(MAKE) --output-sync=target --keep-going -j 3 test-main test-compiled test-interpreted

# Files in the order of tests/conftest.py: the long ones first, so that no worker is left waiting.
test-main: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD) $(PYTEST_ARGS)

# 5: no test was chosen, which PYTEST_ARGS="-k name" may mean here.
test-interpreted test-compiled: test-%: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kernels/$* $(PYTEST_ARGS) || [ $$? -eq 5 ]

# On a GPU, which the workers share. Every worker that trains compiles FlexAttention: few of them.
test-gpu: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 6 --dist loadgroup tests/kernels/gpu $(PYTEST_ARGS)
	$(BIN)/python -m pytest -n 2 tests/modules/gpu $(PYTEST_ARGS)

# The slow proofs, and those of the kernels once more with the oldest Triton that they are for.
test-long: $(VENV)/.installed-dev $(OLD_TRITON)/.installed
	$(MAKE) --output-sync=target --keep-going -j 2 test-long-main test-long-kernels

test-long-main: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long $(SPREAD) $(PYTEST_ARGS)

test-long-kernels: $(VENV)/.installed-dev $(OLD_TRITON)/.installed
	$(BIN)/python -m pytest -m long tests/kernels/compiled $(PYTEST_ARGS)
	PYTHONPATH=$(OLD_TRITON) $(BIN)/python -m pytest tests/kernels/interpreted $(PYTEST_ARGS)
	PYTHONPATH=$(OLD_TRITON) $(BIN)/python -m pytest -m 'not long or old_triton' tests/kernels/compiled $(PYTEST_ARGS)

bench: $(VENV)/.installed-dev
	$(BIN)/lit-align bench $(BENCH_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find notebooks -name '*.ipynb' -exec $(BIN)/nbstripout --verify {} +

types: $(VENV)/.installed-dev view
	MYPYPATH=$(VIEW) $(BIN)/mypy

imports: $(VENV)/.installed-dev view
	PYTHONPATH=$(VIEW) $(BIN)/lint-imports

# pip-audit stands apart, so that what it needs itself is not audited; without a network the rest of
# the audit is done all the same.
audit: $(VENV)/.installed-dev
	-@[ -e $(PIP_AUDIT)/.installed ] || { $(BIN)/python -m venv $(PIP_AUDIT) && \
		$(PIP_AUDIT)/bin/python -m pip --disable-pip-version-check install --quiet pip-audit==2.10.1 && \
		touch $(PIP_AUDIT)/.installed; }
	$(BIN)/python scripts/audit.py --sbom build/sbom.cdx.json --pip-audit $(PIP_AUDIT)/bin/pip-audit

# kernels/ has no __init__.py (see pyproject.toml), and neither mypy nor import-linter finds a
# package that is called otherwise than its folder: show them one made of links.
view:
	rm -rf $(VIEW)
	mkdir -p $(VIEW)/lit_align_kernels
	touch $(VIEW)/lit_align_kernels/__init__.py
	ln -s $(CURDIR)/kernels/* $(VIEW)/lit_align_kernels/

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lit-align needs Python 3.11 or later; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# With TORCH_INDEX torch itself comes from there alone, and what it depends on from either index.
$(VENV)/.torch: constraints.txt | $(BIN)/python
ifneq ($(strip $(TORCH_INDEX)),)
	$(PIP) install --no-deps --index-url "$(TORCH_INDEX)" --constraint constraints.txt torch
endif
	touch $@

INSTALL = $(PIP) install --constraint constraints.txt $(if $(strip $(TORCH_INDEX)),--extra-index-url "$(TORCH_INDEX)") --editable

$(VENV)/.installed: $(REQUIREMENTS) $(VENV)/.torch
	$(INSTALL) ".[report]"
	touch $@

$(VENV)/.installed-dev: $(REQUIREMENTS) $(VENV)/.torch
	$(INSTALL) ".[dev]"
	touch $@ $(VENV)/.installed

$(OLD_TRITON)/.installed: | $(VENV)/.installed-dev
	$(PIP) install --no-deps --target $(OLD_TRITON) triton==3.6.0
	touch $@
