# Needs Python 3.11, make and git; everything else is installed into .venv.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
BIN    := .venv/bin

.PHONY: demo test test-packages check bench soak cross-version format clean
.DELETE_ON_ERROR:

# torch first, and named again beside the rest: a plain `torch` requirement would fetch gigabytes of CUDA packages.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" --editable ".[dev,bench]"
	touch $@

demo: .venv/installed
	$(BIN)/python examples/demo.py

# Beyond Python: the tests of the service boot a systemd in namespaces. Does nothing where all is there.
TEST_PACKAGES := systemd util-linux passwd procps
test-packages:
	@test -x /lib/systemd/systemd && command -v nsenter setpriv useradd pgrep >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends $(TEST_PACKAGES); }

test: .venv/installed
	$(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --package ckptd
	$(BIN)/mypy benchmarks examples

bench: .venv/installed
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# 2,000 saves with kills at random, about half an hour; SOAK_ARGS="--saves 200 --seed 5" for less and others.
soak: .venv/installed
	$(BIN)/python tests/soak/run.py $(SOAK_ARGS)

# Other torch versions in environments of their own, removed afterwards; CUDA builds take gigabytes meanwhile.
CROSS ?= 2.13.0 2.14.1
cross-version: .venv/installed
	$(BIN)/python tests/cross_version/run.py $(CROSS)

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
