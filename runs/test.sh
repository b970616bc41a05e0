#!/usr/bin/env bash
# the tests: set up what they need, then run the quick ones. minutes: 3 on 2 cpu cores, plus the installation. words are
# passed to pytest: bash runs/test.sh tests/test_data.py -k roundtrip, or -m reliability for what is promised, or
# -m 'not gpu' for all.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/venv.sh
venv "[dev]"
smollm2 > /dev/null || echo "no SmolLM2 to be had, the tests with a real language model skip"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a thread a test process, there are as many of these as cores
ruff check --quiet .
python -m pytest -q -n auto -m "not slow and not browser and not gpu" "$@"
