#!/usr/bin/env bash
# Runs the fast tests with the oldest packages that conda.yaml and the optional groups allow, in an environment of
# their own: every lower bound that is stated works. `make test-lowest PYTHON=...` chooses the Python.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${LOWEST:-/var/tmp/aliprod-lowest}
limits=$(python -m pip config list | sed -nE "s/^global\.constraint='(.*)'$/\1/p") # uv does not read pip's settings

uv venv --quiet --clear "$folder" --python "$(readlink -f "$(command -v python)")"
VIRTUAL_ENV=$folder uv pip install --quiet --resolution lowest-direct ${limits:+--constraint "$limits"} \
    --editable '.[server]'
VIRTUAL_ENV=$folder uv pip install --quiet --group dev # the tools of the tests are as new as anywhere
export PATH=$folder/bin:$PATH
OMP_NUM_THREADS=1 pytest -n logical --maxprocesses 4 --dist loadfile --max-worker-restart 0
