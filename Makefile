# `make help` lists the targets. Everything is installed into .venv, from conda.yaml's pip list.
# The newest Python that the environment is for and that can make one (Debian has venv apart). Another: make PYTHON=...
PYTHONS := python3.13 python3.12 python3.11
PYTHON ?= $(firstword $(foreach python,$(PYTHONS),$(shell $(python) -c 'import ensurepip; print("$(python)")' 2>/dev/null)))
export PATH := $(CURDIR)/.venv/bin:$(PATH)
READY := .venv/.ready

.PHONY: help demo test test-all test-bare bounds test-lowest lint bench server team-server clean

help:     ## List the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(READY)     ## Render the demo catalogue, train its recogniser, say where the results are
	mlflow run . -e train --env-manager local --experiment-name demo

test: $(READY)     ## Run the tests (some 8 minutes on 2 cores)
	OMP_NUM_THREADS=1 pytest -n logical --maxprocesses 4 --dist loadfile --max-worker-restart 0

test-all: test     ## Run the slow tests too
	pytest -m slow

test-bare:         ## Run make demo and make test in bare Debian 12 and 13 systems (root, debootstrap, 30 GB)
	tests/bare.sh

bounds: $(READY)   ## Resolve the lowest and the highest packages that conda.yaml allows, on every Python
	pytest -m slow tests/test_environment.py

test-lowest: $(READY) ## Run the fast tests with the oldest packages that conda.yaml allows
	tests/lowest.sh

lint: $(READY)     ## Check style and types
	ruff check . && ruff format --check . && mypy aliprod entrypoints tracking

bench: $(READY)    ## Measure the ways of doing the same work against each other
	python -m benchmarks

server: $(READY)   ## Open the tracking server's pages at http://127.0.0.1:5000
	mlflow server --host 127.0.0.1 --port 5000

team-server: $(READY) ## Start the server of a team: PostgreSQL, S3 and MLflow behind a password, in work/team
	python -m tracking.server --folder work/team

clean:             ## Remove what was installed; runs and data stay
	rm -rf .venv

$(READY): conda.yaml pyproject.toml
	@test -n "$(PYTHON)" || { for python in $(PYTHONS); do command -v $$python >/dev/null && break; done \
		&& echo "$$python cannot make an environment: install its venv (apt install $$python-venv)" >&2 \
		|| echo "None of $(PYTHONS) is here: install one (apt install python3-venv) or name it: make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv --clear .venv
	python -m pip install --quiet --upgrade pip
	python -m pip install --quiet --editable '.[server]' --group dev
	touch $@
