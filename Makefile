# The commands of this repository. Each makes .venv first where it is missing; `make` alone lists them.
SHELL := bash
PYTHON := .venv/bin/python
TORCH ?= 2.11.0
ARGS ?=

.PHONY: help setup train test test-torch test-long lint docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## make .venv with the tested versions (instant when it is there)
	@scripts/setup.sh

train: setup  ## train a small model on what this machine has; ARGS="--training.steps 50" overrides keys
	@scripts/quickstart.sh $(ARGS)

lint: setup  ## ruff, mypy and shellcheck
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy dtron
	.venv/bin/shellcheck --severity=warning scripts/*.sh scripts/slurm/*.sbatch .ci/run

test: lint  ## lint, then all but the long tests, two files at a time
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-torch: TESTS := parity models parallel config checkpoint train ranks observe hf plan verify explain library compare bench
test-torch:  ## the tests that depend on torch, with another one in an environment of its own: TORCH=2.11.0
	@scripts/setup.sh $(TORCH)
	.venv-torch-$(TORCH)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(addprefix tests/,$(TESTS)) $(ARGS)

test-long: setup  ## the long tests (with lm-eval and wandb, which this installs); the log goes to tests/long.log
	$(PYTHON) -m pip install -qq --disable-pip-version-check -c .venv/constraints.txt -e '.[eval,wandb]'
	set -o pipefail; $(PYTHON) -m pytest -m long -vv --durations=10 $(ARGS) 2>&1 | tee tests/long.log

docs: setup  ## build the documentation as a site, site/index.html, every link checked
	$(PYTHON) -m mkdocs build --strict --quiet

clean:  ## delete caches and build artefacts; never outputs/, .cache/ or .venv*/
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . \( -path './.venv*' -o -path ./.git -o -path ./outputs -o -path ./.cache \) -prune \
	    -o -type d -name __pycache__ -exec rm -rf {} +
