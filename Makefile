# Needs Python 3.11, make and git; everything else is installed into .venv.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
BIN    := .venv/bin

# What some tests drive: strace, file systems on loop devices, a systemd in namespaces, Prometheus and a browser.
# They skip, with the reason, where it is lacking.
PROGRAMS := strace mkfs.xfs mkfs.btrfs mkfs.ext4 chattr fuse2fs systemd-analyze nsenter setpriv useradd pgrep \
            prometheus promtool chromium
PACKAGES := strace xfsprogs btrfs-progs e2fsprogs fuse2fs systemd util-linux passwd procps \
            prometheus chromium fonts-dejavu-core
SUDO     := $(if $(filter 0,$(shell id -u)),,sudo -n)

.PHONY: demo test system-packages faults fuzz check bench soak cross-version dashboards page-picture format clean
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

# Debian's and Ubuntu's packages; nothing is asked of apt where all programs are there.
system-packages:
	@PATH="$$PATH:/usr/sbin:/sbin"; for program in $(PROGRAMS); do \
	  command -v $$program >/dev/null || { echo "$$program is missing: installing $(PACKAGES)"; \
	    $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive \
	      apt-get install -qq --yes --no-install-recommends $(PACKAGES) >/dev/null; exit $$?; }; \
	done

# Each call on files, each error, at each position; `make test` has a third of the combinations.
faults: .venv/installed
	CKPTD_ALL_FAULTS=1 $(BIN)/python -m pytest tests/fault/test_system_calls.py

# A hundred times the damaged input of the tests, from another seed each time; a failure names the seed.
fuzz: .venv/installed
	CKPTD_FUZZ_SEED=$${SEED:-$$(date +%s)} CKPTD_FUZZ_COUNT=$${COUNT:-150000} $(BIN)/python -m pytest tests/fault/test_fuzz.py

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --package ckptd
	$(BIN)/mypy benchmarks examples dashboards

bench: .venv/installed
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# 2,000 saves with kills at random, about half an hour; SOAK_ARGS="--saves 200 --seed 5" for less and others.
soak: .venv/installed
	$(BIN)/python tests/soak/run.py $(SOAK_ARGS)

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

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
