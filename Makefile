# `make test` installs what is missing and runs every test; `make check` runs the linters and the type checker.
PYTHON ?= python3.11
PY := .venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install install-dev test check

install: .venv/.stack
install-dev: .venv/.dev

# Two steps, because NeMo's and Megatron-Core's own pins ask for CUDA-only packages (see requirements-nemo.txt).
.venv/.stack: requirements.txt requirements-light.txt requirements-nemo.txt constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	$(PY) -m pip install -q --no-deps -r requirements-nemo.txt
	touch $@

.venv/.dev: .venv/.stack requirements-dev.txt
	$(PY) -m pip install -q -r requirements-dev.txt
	touch $@

test: install-dev
	$(PY) -m pytest

check: install-dev
	$(PY) -m ruff check .
	$(PY) -m mypy
