#!/usr/bin/env bash
# text, end to end: the docstrings of installed packages become token shards, a hybrid of 4 layers trains on them for 3
# minutes, says something, is asked some items of HellaSwag, and its blocks begin a training on the small tasks of ARC,
# beside one from scratch.
# hardware: a laptop, 2 cpu cores. minutes: 8 to 10. dollars: 0. expect: validation 3.8 nats a token, where the unigram
# entropy is 6.6
# docstrings are the fairest text that is there without a download: sentences, no code, few licences. each is taken
# once, and modules are put in order by their hash, so that no validation text is a copy, though a package's docstrings
# resemble each other.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/venv.sh
venv "[text]"
SECONDS=0
OUT=${OUT:-out/text}
ITERS=${ITERS:-300} # steps of each training on tasks
mkdir -p "$OUT"
if [ ! -f "$OUT/docstrings.jsonl" ]; then
    echo "== collecting docstrings"
    python - "$OUT/docstrings.jsonl" <<'EOF'
import ast, hashlib, json, os, sys, sysconfig, warnings
from importlib.util import find_spec
from pathlib import Path
warnings.simplefilter('ignore') # of old escapes in strings
paths = sorted(Path(sysconfig.get_path('stdlib')).glob('*.py')) # and of the packages that nanoarc[text] brings:
for name in ('numpy', 'torch', 'sympy', 'networkx', 'matplotlib', 'polars', 'numba', 'datasets', 'huggingface_hub',
             'fsspec', 'rich'):
    paths += sorted(Path(find_spec(name).origin).parent.rglob('*.py'))
seen, docs = set(), []
for path in paths:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError: # tests of what no parser, or only a later one, takes
        continue
    nodes = [x for x in ast.walk(tree) if isinstance(x, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    texts = dict.fromkeys(ast.get_docstring(node) or '' for node in nodes)
    texts = [x for x in texts if len(x) >= 80 and x not in seen and x.encode('utf-8', 'replace').decode() == x]
    seen.update(texts)
    if texts:
        docs.append("\n\n".join(texts))
docs.sort(key=lambda x: hashlib.sha256(x.encode()).digest())
temp = sys.argv[1] + '.tmp'
with open(temp, 'w') as f:
    f.writelines(json.dumps({'text': x}) + "\n" for x in docs)
os.replace(temp, sys.argv[1])
print(f"{len(docs):,} modules, {len(seen):,} docstrings, {sum(map(len, docs)) / 1e6:.1f} M characters")
EOF
fi
echo "== token shards"
nanoarc text prepare --dataset "$OUT/docstrings.jsonl" --train_bpe 4096 --shard_tokens 200000 \
    --out_dir "$OUT/shards" | tail -1
if began "$OUT/run"; then
    nanoarc train --resume "$OUT/run"
else
    echo "== training a hybrid on them, 3 minutes"
    nanoarc train --text "$OUT/shards" --mixer MA --n_layer 4 --n_embd 128 --block_size 256 --batch_tokens 2048 \
        --val_tokens 65536 --minutes 3 --out_dir "$OUT/run"
fi
python - "$OUT" <<'EOF'
import sys
import numpy as np
from pathlib import Path
from nanoarc import checkpoint
from nanoarc.text import open_shard
shards = sorted(Path(sys.argv[1], 'shards').glob('*.npy'))
p = np.bincount(np.concatenate([open_shard(x) for x in shards]))
p = p[p > 0] / p.sum()
entropy = -(p * np.log(p)).sum()
loss = checkpoint.load(f"{sys.argv[1]}/run")[1]['val_loss']
print(f"validation {loss:.3f} nats a token, unigram entropy {entropy:.3f}")
sys.exit(int(loss >= entropy))
EOF
echo "== what it says"
nanoarc text sample --model "$OUT/run" --prompt "Returns the number of" --num 2 --most 50
echo "== HellaSwag (chance is 0.25, and so is a model of this size)"
ITEMS=${NANOARC_TEST_DATA:-}/hellaswag_val_2000.jsonl
if [ ! -f "$ITEMS" ]; then
    ITEMS="$OUT/items.jsonl"
    echo '{"ctx": "The function returns", "label": 0, "endings":' \
        '["a list of numbers.", "banana the of of.", "of a the is.", "xylophone quickly."]}' > "$ITEMS"
fi
nanoarc text hellaswag --model "$OUT/run" --file "$ITEMS" --limit 100 | tail -1
echo "== tasks: from its blocks, and from scratch"
for seed in 1 2; do
    for from in text scratch; do
        run="$OUT/arc-$from-$seed"
        began "$run" > /dev/null || nanoarc train --data arc1/training --adapt 'arc1/evaluation*8' --max_pair 100 \
            --minutes 0 --max_iters "$ITERS" --seed $seed --mixer MA --draw_every 0 --eval_every 150 \
            $([ $from = text ] && echo "--init_from $OUT/run") --out_dir "$run" \
            | grep -e "blocks" -e "validation:" -e "nats" || true
    done
done
python - "$OUT" $SECONDS <<'EOF'
import json, sys
from nanoarc import checkpoint
from nanoarc.run import read_metrics
out, seconds = sys.argv[1:]
meta = checkpoint.load(f"{out}/run")[1]
nats = {'text': [], 'scratch': []} # a list a seed
for start, found in nats.items():
    for seed in (1, 2):
        rows = [x for x in read_metrics(f"{out}/arc-{start}-{seed}") if 'val_loss' in x]
        found.append([round(x['val_loss'], 3) for x in rows[1:]])
print(json.dumps({'text_nats': round(meta['val_loss'], 3), 'text_tokens': meta['tokens'], 'arc_val_nats': nats,
                  'seconds': int(seconds)}))
EOF
