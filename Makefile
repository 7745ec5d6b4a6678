# `make demo` trains a small Llama on this machine in every precision and reports; `make test` runs every test, and
# `make fast` those that take no NeMo, Slurm or GPU, and not seconds each; `make check` the linters and the type checker;
# `make bench` the cost of an FP8 step; `make faults` breaks things on purpose (half an hour on two cores; interrupted, it
# goes on) and writes what was lost into docs/reliability.md.  Each installs what is missing.
PYTHON ?= python3.11
PY := .venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# As many workers as cores.  Each takes whole files and groups, for their tests share runs; the longest first.
PARALLEL := -n logical --maxprocesses 8 --dist loadgroup --no-loadscope-reorder

.PHONY: demo test fast check bench faults install install-dev

# Interrupted, it continues where it stopped.  The second BF16 seed is the noise floor.
demo: install
	$(PY) -m recipes.training.data experiment=demo
	$(PY) -m launch -m experiment=demo precision=bf16 seed=1,2
	$(PY) -m launch -m experiment=demo precision=fp8_delayed,fp8_current,fp8_subchannel,mxfp8
	$(PY) -m analysis.report runs/demo/*.seed* --out runs/demo/report.html

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
	$(PY) -m pytest $(PARALLEL)

fast: install-dev
	$(PY) -m pytest $(PARALLEL) -m "not nemo and not slurm and not gpu and not slow"

check: install-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports --no-logo
	.venv/bin/shellcheck .ci/run
	git ls-files '*.ipynb' | xargs -r .venv/bin/nbstripout --verify

bench: install
	$(PY) -m recipes.measure.gpu.emulation_cpu

faults: install-dev
	STARTS=200 $(PY) -m pytest tests/launch/test_start.py -k every_start
	$(PY) -m tests.faults
