# Everything here starts from a bare clone; it needs Python 3.11 or newer, make and a C library, and fetches the rest.
#
#   make convert                          the whole road on the embedded model
#   make convert RECIPE=my.yaml SOC="SM8550 SM8750" ARGS="--fresh"

PYTHON ?= python3
RECIPE ?= pasd_tiny
SOC    ?=
ARGS   ?=
JOBS   ?= 2

UV     := $(or $(shell command -v uv),build/uv/bin/uv)
PY     := .venv/bin/python
READY  := .venv/ready

.PHONY: setup convert test test-slow lint bench bench-sim docs

convert: $(READY)
	@.venv/bin/sdconvert convert $(RECIPE) $(foreach soc,$(SOC),--soc $(soc)) $(ARGS)

setup: $(READY)

test: $(READY)
	@$(PY) -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	@$(PY) -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "slow or not slow"

lint: $(READY)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

bench: $(READY)
	@for script in $(sort $(wildcard benchmarks/*.py)); do echo "== $$script"; $(PY) $$script || exit 1; done

# The bundle of the recipe behind adb, without a phone: its answers must be the simulator's, bit for bit.
bench-sim: $(READY)
	@.venv/bin/sdconvert package $(RECIPE) $(foreach soc,$(SOC),--soc $(soc)) $(ARGS)
	@PYTHONPATH=tests/android $(PY) scripts/bench_sim.py build/$(notdir $(basename $(RECIPE)))/70-android/bundle

docs: $(READY)
	@$(PY) scripts/make_docs.py

# Installed once; again only when what is to be installed has changed.
$(READY): requirements.lock pyproject.toml | $(UV)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: sdconvert needs Python 3.11 or newer\n\nhint: make PYTHON=/path/to/python3.11")'
	@test -x $(PY) || $(UV) venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv
	$(UV) pip install --quiet --compile-bytecode --python $(PY) --require-hashes -r requirements.lock
	@# The build tool comes from the lock too: nothing unpinned is fetched.
	$(UV) pip install --quiet --python $(PY) --no-deps --no-build-isolation --editable .
	@touch $@

build/uv/bin/uv:
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install --quiet uv==0.13.8
