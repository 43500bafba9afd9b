# Needs Python 3.11, make and git; everything else is installed into .venv.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
BIN    := .venv/bin

.PHONY: demo test check bench cross-version dashboards page-picture system-packages format clean
.DELETE_ON_ERROR:

# torch first, and named again beside the rest: a plain `torch` requirement would fetch gigabytes of CUDA packages.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" --editable ".[dev,bench]"
	touch $@

demo: .venv/installed
	$(BIN)/python examples/demo.py

test: .venv/installed
	$(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --package ckptd
	$(BIN)/mypy benchmarks examples dashboards

bench: .venv/installed
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# Other torch versions in environments of their own, removed afterwards; CUDA builds take gigabytes meanwhile.
CROSS ?= 2.13.0 2.14.1
cross-version: .venv/installed
	$(BIN)/python tests/cross_version/run.py $(CROSS)

# Grafana's dashboards and Prometheus's rules, from the lists in dashboards/.
dashboards: .venv/installed
	$(BIN)/python -m dashboards

# docs/page.png: the live page of a daemon that saves, by day on a desk and by night on a phone.
page-picture: .venv/installed
	CKPTD_PAGE_PICTURE=docs/page.png $(BIN)/python -m pytest tests/integration/test_page.py -k picture

# What tests use of the system, by Debian's names; tests that find a program missing skip, but fail in CI.
SYSTEM_PACKAGES := \
	chromium \
	fonts-dejavu-core \
	prometheus
AS_ROOT := $(if $(filter-out 0,$(shell id -u)),sudo -n)
system-packages:
	dpkg --status $(SYSTEM_PACKAGES) >/dev/null 2>&1 || \
		{ $(AS_ROOT) apt-get update -q && $(AS_ROOT) apt-get install -qy --no-install-recommends $(SYSTEM_PACKAGES); }

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
