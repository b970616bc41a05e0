#!/usr/bin/env bash
# a pretrained hybrid of 0.5 to 3 billion parameters on all of ARC-AGI-1:
#   bash runs/finetune_gpu.sh ibm-granite/granite-4.0-h-350m-base
# bf16 weights, LoRA in fp32, in context, demos of the evaluation tasks among the training ones, answers unseen. the
# first line says what memory it takes: it grows with --batch_tokens; --no_recompute takes more and is faster. hybrids
# want `pip install mamba-ssm causal-conv1d`: without these transformers falls back to plain PyTorch, which is slow and
# keeps some 0.3 MB a token and layer. words after the id go to the training.
# hardware: one GPU of 24 GB or more. minutes: MINUTES (60) of training, SOLVE_MINUTES (30) of solving, with a fifth
# more. expect: nobody has run it yet.
# SLICE=540: a call takes so many seconds at most, saves and exits with 75 until all is done; the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { sed -n 2,11p "$0"; exit 2; }
BASE=$1
shift
source runs/venv.sh
venv "[finetune]"
OUT=${OUT:-out/finetune_${BASE//\//_}}
SLICE=${SLICE:-0}
SECONDS=0
run() { # a command, for what is left of the slice. SIGTERM lets it save
    [ "$SLICE" = 0 ] || [ $((SLICE - SECONDS)) -gt 0 ] || exit 75
    local code=0
    if [ "$SLICE" = 0 ]; then
        "$@" || code=$?
    else
        timeout --foreground --signal=TERM --kill-after=60 $((SLICE - SECONDS)) "$@" || code=$?
    fi
    [ $code != 124 ] || { echo "== stopped after $SECONDS s, the same command goes on"; exit 75; }
    return $code
}
if began "$OUT"; then
    run nanoarc finetune --resume "$OUT"
else
    run nanoarc finetune --base "$BASE" --data arc1/training+arc2/training --drop_overlap --adapt 'arc1/evaluation*4' \
        --block_size 4096 --batch_tokens 8192 --recompute --minutes "${MINUTES:-60}" \
        --save_every 100 --eval_every 500 --draw_every 0 --out_dir "$OUT" "$@"
fi
PARTS=$(((${SOLVE_MINUTES:-30} + 4) / 5)) # of 5 minutes and other views each, so that one of them fits into a slice
for k in $(seq 0 $((PARTS - 1))); do
    if [ -f "$OUT/part$k/solve.json" ] && [ ! -f "$OUT/part$k/solving-0.json" ]; then continue; fi # the latter: stopped
    run nanoarc solve --run "$OUT" --data arc1/evaluation --out_dir "$OUT/part$k" --seed $((1337 + k)) --views 16 \
        --minutes 5
done
run nanoarc solve --merge "$OUT"/part*/candidates.jsonl --data arc1/evaluation --out_dir "$OUT"
run nanoarc score "$OUT/submission.json" arc1/evaluation | tail -2
