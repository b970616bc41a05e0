"""
text: token shards of any corpus, a loader of them with the promises of the ARC loader, HellaSwag, samples. a directory
of shards, as build-nanogpt (.npy) and llm.c and modded-nanogpt (.bin) have it:

    edufineweb_val_000000.npy     uint16 tokens, document after document, each begun by the end-of-text token.
    edufineweb_train_000001.npy   .bin: 256 int32 first (magic, version, number of tokens), then the same tokens
    tokenizer.json                by which the text became tokens
    manifest.json                 sizes and sha256 of the shards. written last: without it they are not all there
"""
import hashlib
import importlib.util
import io
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numba import carray, njit, types
from numba.extending import intrinsic

from nanoarc import checkpoint, solve, train
from nanoarc.data import EPOCH, ArcLoader, Buffers, U, bijection, mix, split

MAGIC, VERSION = 20240520, 1 # of .bin, github.com/karpathy/llm.c dev/data/data_common.py
ENCODED = 2**21 # characters that are encoded together
GPT2_VOCAB = 50257 # tokens of shards that others made, without a manifest

@dataclass
class TextConfig:
    text: str = '' # directory of token shards, as nanoarc text prepare writes it. train: on them in place of ARC
    block_size: int = 1024 # tokens of a row
    batch_tokens: int = 8192 # tokens of a micro batch, over all ranks: a multiple of block_size
    order: str = 'shuffle' # rows: 'shuffle' = each window of block_size once an epoch | 'sequential' = shard after shard, as build-nanogpt's DataLoaderLite
    val_tokens: int = 131072 # so many tokens of the first validation shard are the validation loss. 0 = none
    check_shards: bool = True # hash every shard before training, about a second a GB

    loss_on, batching = 'all', 'pad' # of every token, in rows of one shape: no fields

    def dataset(self, seed):
        return TextDataset(self, seed)

    def model_config(self, base):
        """ a ModelConfig made one for the tokens of this directory: a place in the row, the vocabulary rounded up """
        return replace(base, rope_bases=(10000.0,), prefix=False, n_task=0, vocab_size=-(-read_manifest(self.text)['vocab_size'] // 64) * 64)

def need(*names):
    """ raises ValueError if one of these packages is not here """
    if missing := [name for name in names if not importlib.util.find_spec(name)]:
        raise ValueError(f"this wants {' and '.join(missing)}: pip install 'nanoarc[{'finetune' if 'transformers' in missing else 'text'}]'")

# -----------------------------------------------------------------------------
# shards

def shard_bytes(tokens, kind):
    """ uint16 tokens -> the bytes of a shard, kind 'npy' or 'bin' """
    if kind == 'bin':
        header = np.zeros(256, np.int32)
        header[:3] = MAGIC, VERSION, len(tokens)
        return header.tobytes() + tokens.tobytes()
    f = io.BytesIO()
    np.save(f, tokens)
    return f.getvalue()

def open_shard(path):
    """ .npy or .bin -> (n,) uint16, mapped: nothing is read yet. raises ValueError that names the file """
    size = Path(path).stat().st_size
    if path.suffix == '.npy':
        try:
            x = np.load(path, mmap_mode='r', allow_pickle=False)
        except (ValueError, EOFError) as e: # numpy does not name the file
            raise ValueError(f"{path}: {e}") from None
        if x.dtype != np.uint16 or x.ndim != 1:
            raise ValueError(f"{path}: want uint16 tokens in one dimension, got {x.dtype} in {x.ndim}")
        return np.asarray(x)
    magic, version, n = np.fromfile(path, np.int32, 3) if size >= 1024 else (0, 0, 0)
    if (magic, version) != (MAGIC, VERSION) or size != 1024 + 2 * n:
        raise ValueError(f"{path}: magic {magic}, version {version}, {n} tokens in {size} bytes: want {MAGIC}, {VERSION}, and 1024 bytes + 2 a token")
    return np.asarray(np.memmap(path, np.uint16, 'r', 1024))

def read_manifest(path):
    """ a directory of shards -> what its manifest says; one that others made, without a manifest, is said to be GPT-2's. raises ValueError """
    path = Path(path)
    if (file := path / 'manifest.json').is_file():
        try:
            m = json.loads(file.read_bytes())
        except ValueError as e:
            raise ValueError(f"{file}: {e}") from None
        m = m if isinstance(m, dict) else {}
        if missing := [key for key in ('vocab_size', 'eot', 'tokenizer_sha256', 'shards') if key not in m] + [key for x in m.get('shards', ()) for key in ('name', 'tokens', 'sha256') if key not in x]:
            raise ValueError(f"{file}: no field {missing[0]!r}")
        return m
    if (path / 'prepare.json').is_file():
        raise ValueError(f"{path}: nanoarc text prepare has not finished here, run it again")
    names = sorted(x.name for x in path.glob('*') if x.suffix in ('.npy', '.bin') and ('train' in x.name or 'val' in x.name))
    if not names or len({Path(x).suffix for x in names}) > 1:
        raise ValueError(f"{path}: {'both .npy and .bin' if names else 'no'} shards here, want NAME_train_000001.npy or .bin, as nanoarc text prepare writes them")
    return {'vocab_size': GPT2_VOCAB, 'eot': GPT2_VOCAB - 1, 'tokenizer_sha256': '', 'shards': [{'name': name} for name in names]}

# -----------------------------------------------------------------------------
# the loader

@intrinsic
def pointer(typingctx, address):
    """ uint64 -> a pointer to uint16, for numba """
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))
    return types.CPointer(types.uint16)(types.uint64), codegen

@njit(cache=True, nogil=True)
def fill(base, shard, at, idx, targets):
    """ addresses of the shards, and of each row its shard and place there -> idx and targets (B, T) int64 are written, straight from the map """
    T = idx.shape[1]
    for r in range(len(at)):
        x = carray(pointer(base[shard[r]] + U(2) * U(at[r])), T + 1)
        for t in range(T):
            idx[r, t] = x[t]
            targets[r, t] = x[t + 1]

@njit(cache=True, nogil=True)
def draw_windows(first, seed, i, n, T):
    """
    rows i..i+n of the stream -> (n,) int64 shard, and token where the row begins. first (shards + 1,) int64: windows before each
    shard. an epoch has each window once, and cuts each shard into windows a few tokens later or sooner than the last one.
    """
    shard, at, total = np.empty(n, np.int64), np.empty(n, np.int64), U(first[-1])
    for r in range(n):
        epoch, j = (i + U(r)) // total, (i + U(r)) % total
        key = mix(mix(mix(U(0), seed), EPOCH), epoch)
        w = np.int64(bijection(j, total, key))
        s = np.searchsorted(first, w, side='right') - 1
        shard[r], at[r] = s, (w - first[s]) * T + np.int64(mix(key, U(s)) % U(T))
    return shard, at

class TextDataset:
    """
    the stream: batch k for any k >= 0, a pure function of (seed, k), for any number of ranks. order='sequential': of (k, rank, world),
    for there each rank goes on to the next shard when its own place says so, as in build-nanogpt. a window that does not fit
    into its shard is left out, as is a shard too short for one. raises ValueError that names a shard that is not what the manifest says.
    """

    def __init__(self, cfg, seed=1337):
        if cfg.order not in ('shuffle', 'sequential') or cfg.block_size < 1 or cfg.batch_tokens < 1 or cfg.batch_tokens % cfg.block_size or cfg.val_tokens < 0 or not 0 <= seed < 2**64:
            raise ValueError(f"order={cfg.order!r} block_size={cfg.block_size} batch_tokens={cfg.batch_tokens} val_tokens={cfg.val_tokens} seed={seed}: want shuffle or sequential, "
                             "batch_tokens a multiple of block_size, no negative number, a seed of 64 bits")
        self.cfg, self.seed, path, m = cfg, seed, Path(cfg.text), read_manifest(cfg.text)
        self.vocab_size, self.eot, self.tokenizer_sha256 = m['vocab_size'], m['eot'], m['tokenizer_sha256']
        self.rows, self.leaks, self.val_pairs, self.batch_rows = {}, [], (), cfg.batch_tokens // cfg.block_size
        self.names, self.shards, hashes = [x['name'] for x in m['shards']], [], []
        for x in m['shards']:
            shard = open_shard(path / x['name'])
            if len(shard) != x.get('tokens', len(shard)):
                raise ValueError(f"{path / x['name']}: {len(shard):,} tokens, the manifest says {x['tokens']:,}")
            if 'sha256' not in x and len(shard) and shard.max() >= self.vocab_size:
                raise ValueError(f"{path / x['name']}: token {shard.max()}, without a manifest.json they are taken for GPT-2's, less than {self.vocab_size}")
            found = checkpoint.file_sha256(path / x['name']) if cfg.check_shards or 'sha256' not in x else x['sha256']
            if found != x.get('sha256', found):
                raise ValueError(f"{path / x['name']}: damaged or changed, its sha256 is {found[:12]}, the manifest says {x['sha256'][:12]}")
            self.shards.append(shard)
            hashes.append(found)
        self.corpus_sha256 = hashlib.sha256(repr((self.tokenizer_sha256, *zip(self.names, hashes))).encode()).hexdigest()
        self.files = {} # beside the checkpoint: who has the run has its tokenizer
        if self.tokenizer_sha256:
            self.files['tokenizer.json'] = (path / 'tokenizer.json').read_bytes()
            if hashlib.sha256(self.files['tokenizer.json']).hexdigest() != self.tokenizer_sha256:
                raise ValueError(f"{path / 'tokenizer.json'}: not the one by which the shards were made")
        self.train = [k for k, name in enumerate(self.names) if 'train' in name] # numbers of shards
        self.val = [k for k, name in enumerate(self.names) if 'train' not in name][:1]
        self.base = np.array([self.shards[k].ctypes.data for k in self.train], U)
        self.sizes = np.array([len(self.shards[k]) for k in self.train], np.int64)
        self.first = np.concatenate([[0], np.cumsum(np.maximum(self.sizes // cfg.block_size - 1, 0))]) # windows before each shard
        least = cfg.batch_tokens + 1 if cfg.order == 'sequential' else 2 * cfg.block_size
        self.num_short = int((self.sizes < least).sum())
        if self.num_short == len(self.sizes):
            raise ValueError(f"{path}: no training shard of {least} tokens or more, of {len(self.sizes)}: a smaller block_size or batch_tokens would do")

    def __len__(self):
        return int(self.sizes.sum())

    def loader(self, rank=0, world=1, device='cpu', prefetch=True):
        return TextLoader(self, rank, world, device, prefetch)

    def about(self):
        """ a line of counts: what is here, and what is not """
        return (f"{len(self.train)} shards, {len(self):,} tokens, vocabulary {self.vocab_size:,}, {len(self.val_rows()) * self.cfg.block_size:,} tokens of validation; "
                f"left out: {self.num_short} shards too short")

    def trained_on(self):
        """ no query of a task """
        return ''

    def plan_window(self, window):
        """ nothing: a batch is found by its number alone """

    def places(self, k, rank, world):
        """ number of a global batch -> of each of this rank's rows (B,) its training shard, and token where it begins """
        T = self.cfg.block_size
        a, b = split(self.batch_rows, rank, world)
        if self.cfg.order == 'shuffle':
            return draw_windows(self.first, U(self.seed), U(k * self.batch_rows + a), b - a, T)
        G = self.batch_rows * T
        batches = np.where(self.sizes > G, np.maximum((self.sizes - 1 - a * T) // G, 1), 0) # until place + G + 1 > size
        ends = np.cumsum(batches)
        k = k % int(ends[-1])
        s = int(np.searchsorted(ends, k, 'right'))
        return np.full(b - a, s), (k - ends[s] + batches[s]) * G + np.arange(a, b) * T

    def val_rows(self):
        """ where the rows of the validation set begin, in its shard """
        tokens = min(self.cfg.val_tokens, len(self.shards[self.val[0]]) - 1) if self.val else 0
        return np.arange(tokens // self.cfg.block_size) * self.cfg.block_size

    def val_batches(self, rank=0, world=1):
        """ the first val_tokens tokens of the first validation shard, in rows of block_size """
        rows, T = self.val_rows(), self.cfg.block_size
        for i in range(0, len(rows), self.batch_rows):
            mine = rows[i : i + self.batch_rows]
            a, b = split(len(mine), rank, world)
            if a < b:
                batch, (idx, targets, *_) = Buffers((b - a) * T, False, True).shaped(b - a, T)
                fill(np.array([self.shards[self.val[0]].ctypes.data], U), np.zeros(b - a, np.int64), mine[a:b], idx, targets)
                yield batch

class TextLoader(ArcLoader):
    """ an ArcLoader whose batches are rows of shards: the same thread, ring of buffers, state. the place in the stream is (0, number of the batch) """

    def __init__(self, dataset, rank=0, world=1, device='cpu', prefetch=True):
        super().__init__(dataset, rank, world, device, prefetch, xy=True)

    def after(self, window, batch):
        return window, batch + 1

    def tokens(self):
        return self.ds.cfg.batch_tokens

    def loss_tokens(self, n=1):
        return n * self.ds.cfg.batch_tokens

    def names(self, window, batch, n=1):
        """ of the shards that this rank's rows of n global batches are from """
        return sorted({self.ds.names[self.ds.train[s]] for k in range(batch, batch + n) for s in self.ds.places(k, self.rank, self.world)[0]})

    def write(self, place, turn):
        shard, at = self.ds.places(place[1], self.rank, self.world)
        B, T = max(len(at), 1), self.ds.cfg.block_size
        buffers = self.ring[turn]
        if buffers is None:
            buffers = self.ring[turn] = Buffers(B * T, False, True, pin=self.device.type == 'cuda')
        if buffers.copied is not None: # on cuda: the copy out of here may still be on its way
            buffers.copied.synchronize()
        batch, (idx, targets, *_) = buffers.shaped(B, T)
        if len(at) == 0: # more ranks than rows: one of no loss
            idx[:], targets[:] = 0, -100
        fill(self.ds.base, shard, at, idx, targets)
        return batch

    def state_dict(self):
        """ as in ArcLoader. the directory may move, its shards may not change """
        state = super().state_dict()
        return {**{key: x for key, x in state.items() if key not in ('text', 'check_shards')}, 'tokenizer_sha256': self.ds.tokenizer_sha256, 'eot': self.ds.eot}

# -----------------------------------------------------------------------------
# prepare

@dataclass
class PrepareConfig:
    dataset: str # a text dataset of the Hugging Face hub, e.g. HuggingFaceFW/fineweb-edu, or a local .txt, .jsonl or .parquet, or a directory of those
    name: str = '' # of a configuration of the dataset, e.g. sample-10BT
    split: str = 'train' # of the dataset
    column: str = 'text' # that holds the text, of .jsonl and .parquet too. a .txt is one document
    out_dir: str = 'data/text' # where the shards go
    stem: str = '' # shards are called STEM_train_000001. '' = edufineweb, or the last part of the dataset's name
    format: str = 'npy' # of the shards: 'npy' = as in build-nanogpt | 'bin' = as in llm.c and modded-nanogpt
    shard_tokens: int = 100_000_000 # tokens of a shard. the first is for validation
    max_tokens: int = 0 # stop after so many. 0 = all
    tokenizer: str = 'gpt2' # 'gpt2' = by tiktoken, which fetches it | a tokenizer.json, or a directory with one
    train_bpe: int = 0 # make a byte-level BPE of so many tokens from the first 100 MB of the text instead. 0 = off
    eot: str = '<|endoftext|>' # the token before each document, by its name in the tokenizer

def local_files(dataset):
    """ a path -> sorted list of (file, its name there) to read, or [] if it is a name on the hub. raises ValueError """
    path, kinds = Path(dataset), ('.txt', '.jsonl', '.parquet')
    if path.is_file() and path.suffix in kinds:
        return [(path, path.name)]
    if path.is_dir():
        found = [(x, x.relative_to(path).as_posix()) for x in path.rglob('*') if x.suffix in kinds and x.is_file() and not x.name.startswith('.')]
        if found:
            return sorted(found, key=lambda x: x[1])
    if path.exists() or dataset.startswith(('.', '/', '~')) or path.suffix in kinds:
        raise ValueError(f"{dataset}: want a .txt, .jsonl or .parquet, or a directory of those{'' if path.exists() else ', and here is nothing'}")
    return []

def checked(text, where):
    """ a text as it is. raises ValueError if it is none """
    if not isinstance(text, str):
        raise ValueError(f"{where}: want a text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as e: # half a surrogate, which json lets through
        raise ValueError(f"{where}: character {e.start} is no unicode") from None
    return text

def documents(cfg, files, skip=0, revision=None):
    """ the texts of a dataset in order, from document number skip on. raises ValueError with file, line and field """
    if not files:
        from datasets import load_dataset
        rows = load_dataset(cfg.dataset, cfg.name or None, split=cfg.split, revision=revision, streaming=True).skip(skip)
        for n, row in enumerate(rows, skip):
            yield checked(row.get(cfg.column), f"{cfg.dataset}: document {n}, field {cfg.column!r}")
    for path, _ in files:
        if path.suffix == '.parquet':
            import polars as pl
            try:
                if cfg.column not in pl.read_parquet_schema(path):
                    raise ValueError(f"{path}: no field {cfg.column!r}, it has {', '.join(pl.read_parquet_schema(path))}")
                column = pl.scan_parquet(path).select(cfg.column)
                n = column.select(pl.len()).collect().item()
                for a in range(min(skip, n), n, 1000):
                    for i, x in enumerate(column.slice(a, 1000).collect().to_series(), a):
                        yield checked(x, f"{path}: row {i}, field {cfg.column!r}")
            except pl.exceptions.PolarsError as e:
                raise ValueError(f"{path}: {e}") from None
            skip = max(skip - n, 0)
            continue
        with open(path, 'rb') as f:
            for n, line in enumerate(f if path.suffix == '.jsonl' else [path.read_bytes()], 1):
                if path.suffix == '.jsonl' and not line.strip():
                    continue
                if skip > 0:
                    skip -= 1
                    continue
                where = f"{path}: line {n}" if path.suffix == '.jsonl' else f"{path}"
                try:
                    x = line.decode('utf-8-sig') if path.suffix == '.txt' else json.loads(line)
                except ValueError as e:
                    raise ValueError(f"{where}: {e}") from None
                if path.suffix == '.jsonl':
                    if not isinstance(x, dict):
                        raise ValueError(f"{where}: want an object with a field {cfg.column!r}, got {type(x).__name__}")
                    where, x = f"{where}, field {cfg.column!r}", x.get(cfg.column)
                yield checked(x, where)

def byte_level(model):
    """ a tokenizers model -> Tokenizer that cuts text as GPT-2 does. it knows nothing of special tokens yet """
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    tok = Tokenizer(model)
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tok

def from_ranks(ranks, special):
    """ tiktoken's {bytes: rank} of a BPE that cuts text as GPT-2 does -> the same as a Tokenizer, special tokens behind """
    from tokenizers import models
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)] # GPT-2 writes each byte as a character, itself where one can see it
    chars = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(x for x in range(256) if x not in printable)}
    def text(x):
        return "".join(chars[b] for b in x)
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda x: x[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2: # which two are merged to it? those that it is made of by all merges before
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges += [tuple(map(text, parts))] if len(parts) == 2 else []
    tok = byte_level(models.BPE({text(x): rank for x, rank in ranks.items()}, merges))
    tok.add_special_tokens(special)
    return tok

def make_tokenizer(cfg, texts):
    """ -> tokenizer.json as bytes: GPT-2's, one's own, or made from texts. raises ValueError """
    if cfg.train_bpe:
        from tokenizers import models, pre_tokenizers, trainers
        def first(size=100 * 2**20):
            for text in texts:
                yield text
                size -= len(text)
                if size < 0:
                    return
        tok = byte_level(models.BPE())
        tok.train_from_iterator(first(), trainers.BpeTrainer(vocab_size=cfg.train_bpe, special_tokens=[cfg.eot], show_progress=False,
                                                             initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
        return tok.to_str().encode()
    if cfg.tokenizer == 'gpt2':
        need('tiktoken')
        from tiktoken_ext.openai_public import gpt2
        try:
            x = gpt2()
        except OSError as e: # also what requests raises
            raise ValueError(f"tokenizer 'gpt2': tiktoken cannot fetch it here ({type(e).__name__}): --train_bpe 8192, or --tokenizer with a tokenizer.json") from None
        return from_ranks(x['mergeable_ranks'], list(x['special_tokens'])).to_str().encode()
    path = Path(cfg.tokenizer)
    path = path / 'tokenizer.json' if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"tokenizer {cfg.tokenizer!r}: want gpt2, a tokenizer.json or a directory with one")
    return path.read_bytes()

def read_tokenizer(data, where):
    """ bytes of a tokenizer.json -> Tokenizer. no text is a special token to it. raises ValueError """
    need('tokenizers')
    from tokenizers import Tokenizer
    try:
        tok = Tokenizer.from_str(data.decode())
    except Exception as e: # it raises nothing narrower
        raise ValueError(f"{where}: {e}") from None
    tok.encode_special_tokens = True
    tok.no_truncation()
    tok.no_padding()
    return tok

def tokenized(texts, tok, eot):
    """ texts -> uint16 tokens of each, end-of-text first. tokenizers encodes a batch on all cores while the next is read """
    def encode(batch):
        return [np.array([eot, *x.ids], np.uint16) for x in tok.encode_batch_fast(batch, add_special_tokens=False)]
    ahead, batch, size = None, [], 0
    with ThreadPoolExecutor(1) as pool:
        for text in texts:
            batch.append(text)
            size += len(text) + 100
            if size > ENCODED:
                now, ahead, batch, size = ahead, pool.submit(encode, batch), [], 0
                yield from now.result() if now else ()
        yield from ahead.result() if ahead else ()
    yield from encode(batch)

def check_disk(cfg, files, done):
    """ raises ValueError if what is to come would not fit: a token for three bytes of text, where the size of that is known """
    size = sum(path.stat().st_size * (2 if path.suffix == '.parquet' else 1) for path, _ in files)
    if not files:
        from datasets import load_dataset_builder
        splits = load_dataset_builder(cfg.dataset, cfg.name or None).info.splits or {}
        size = (splits[cfg.split].num_bytes or 0) if cfg.split in splits else 0
    tokens = min(x for x in (size / 3 or 2 * cfg.shard_tokens, cfg.max_tokens or float('inf'))) - done
    free = shutil.disk_usage(cfg.out_dir).free
    if 2 * tokens > free:
        raise ValueError(f"{cfg.out_dir}: about {2 * tokens / 1e9:.1f} GB of shards are to come, {free / 1e9:.1f} GB are free")

def prepare(cfg):
    """ text prepare --dataset D: a corpus -> token shards. killed at any moment, the same command goes on """
    out = Path(cfg.out_dir)
    if cfg.format not in ('npy', 'bin') or cfg.shard_tokens < 1 or cfg.max_tokens < 0 or not (cfg.train_bpe == 0 or 300 <= cfg.train_bpe <= 2**16):
        raise ValueError(f"format={cfg.format!r} shard_tokens={cfg.shard_tokens} max_tokens={cfg.max_tokens} train_bpe={cfg.train_bpe}: want npy or bin, at least 1, no negative number, 300 to 65536")
    need('tokenizers', *([] if (files := local_files(cfg.dataset)) else ['datasets'])) # before anything is begun
    stem = cfg.stem or ('edufineweb' if cfg.dataset.endswith('fineweb-edu') else Path(cfg.dataset).stem.lower())
    settings = {**{key: x for key, x in asdict(cfg).items() if key != 'out_dir'}, 'stem': stem,
                'files': [[name, path.stat().st_size, path.stat().st_mtime_ns] for path, name in files]}
    if 'train' in stem or 'val' in stem:
        raise ValueError(f"stem={stem!r}: 'train' and 'val' in the name of a shard say what it is for, choose another --stem")
    with checkpoint.lock(out):
        for name in ('manifest.json', 'prepare.json'):
            if (out / name).is_file():
                state = json.loads((out / name).read_bytes())
                if wrong := [f"{key} differs (there {str(state['settings'].get(key))[:60]}, now {str(x)[:60]})" for key, x in settings.items() if state['settings'].get(key) != x]:
                    raise ValueError(f"{out} holds shards made otherwise, choose another --out_dir: {'; '.join(wrong)}")
                if name == 'manifest.json':
                    (out / 'prepare.json').unlink(missing_ok=True)
                    print(f"{out}: done already")
                    return state
                break
        else:
            if foreign := [x.name for x in out.iterdir() if x.suffix in ('.npy', '.bin')]:
                raise ValueError(f"{out} holds shards of others, e.g. {foreign[0]}: choose another --out_dir")
            state = {'settings': settings, 'revision': None, 'documents': 0, 'used': 0, 'shards': []}
            if not files: # the hub moves on, a resumed run does not
                from huggingface_hub import HfApi
                state['revision'] = HfApi().dataset_info(cfg.dataset).sha
            check_disk(cfg, files, 0)
            data = make_tokenizer(cfg, documents(cfg, files, 0, state['revision']))
            state['tokenizer_sha256'] = hashlib.sha256(data).hexdigest()
            checkpoint.write_file(out / 'tokenizer.json', data)
            checkpoint.write_file(out / 'prepare.json', json.dumps(state).encode())
        tok = read_tokenizer((out / 'tokenizer.json').read_bytes(), out / 'tokenizer.json')
        vocab_size, eot = tok.get_vocab_size(), tok.token_to_id(cfg.eot)
        if checkpoint.file_sha256(out / 'tokenizer.json') != state['tokenizer_sha256']:
            raise ValueError(f"{out / 'tokenizer.json'}: changed since these shards were begun")
        if eot is None or vocab_size > 2**16:
            (out / 'prepare.json').unlink() # nothing is lost
            raise ValueError(f"tokenizer {cfg.tokenizer!r}: {vocab_size:,} tokens, {'none' if eot is None else 'one'} called {cfg.eot!r}: want at most 65,536, and --eot one of them")
        for x in state['shards']:
            if len(open_shard(out / x['name'])) != x['tokens']:
                raise ValueError(f"{out / x['name']}: changed since it was written")
        done = sum(x['tokens'] for x in state['shards'])
        check_disk(cfg, files, done)
        if done:
            print(f"going on after {len(state['shards'])} shards, {done:,} tokens")
        buffer, n, number, used, began, start = np.empty(cfg.shard_tokens, np.uint16), 0, state['documents'], state['used'], done, time.perf_counter()

        def flush():
            k = len(state['shards'])
            name, data = f"{stem}_{'train' if k else 'val'}_{k:06d}.{cfg.format}", shard_bytes(buffer[:n], cfg.format)
            checkpoint.write_file(out / name, data)
            state.update(documents=number, used=used, shards=[*state['shards'], {'name': name, 'tokens': n, 'sha256': hashlib.sha256(data).hexdigest()}])
            checkpoint.write_file(out / 'prepare.json', json.dumps(state).encode())
            print(f"{name}: {n:,} tokens, {number:,} documents so far, {(done - began) / (time.perf_counter() - start):,.0f} tokens / s", flush=True)

        last = cfg.max_tokens or float('inf')
        for tokens in tokenized(documents(cfg, files, number, state['revision']), tok, eot):
            while used < len(tokens) and done < last: # what of it is not written yet
                x = tokens[used : min(used + cfg.shard_tokens - n, used + last - done)]
                buffer[n : n + len(x)] = x
                n, used, done = n + len(x), used + len(x), done + len(x)
                if n == cfg.shard_tokens:
                    flush()
                    n = 0
            if done >= last:
                break
            number, used = number + 1, 0
        if not state['shards'] or (len(state['shards']) == 1 and n == 0):
            for path in [out / 'prepare.json', *(out / x['name'] for x in state['shards'])]:
                path.unlink()
            raise ValueError(f"{cfg.dataset}: {done:,} tokens fill one shard, which is for validation: want --shard_tokens of less than half")
        if n > 0:
            flush()
        manifest = {key: state[key] for key in ('settings', 'revision', 'tokenizer_sha256', 'shards')} | {'vocab_size': vocab_size, 'eot': eot, 'documents': number, 'tokens': done}
        checkpoint.write_file(out / 'manifest.json', json.dumps(manifest, indent=1).encode())
        (out / 'prepare.json').unlink()
        print(f"{out}: {len(state['shards'])} shards, {done:,} tokens of {number:,} documents, vocabulary {vocab_size:,}")
        return manifest

# -----------------------------------------------------------------------------
# language models

def load_run(run, device):
    """ out_dir of a run of text -> (Model in eval mode, Tokenizer, number of the end-of-text token). raises ValueError """
    tensors, meta = checkpoint.load(run)
    if 'text' not in meta['data']:
        raise ValueError(f"{run}: a run of tasks, want one of text")
    model = train.configs(meta)[0].model(device).eval()
    checkpoint.restore_model(model, tensors, checkpoint.best_part(meta))
    path, want = Path(run) / 'tokenizer.json', meta['stream']['tokenizer_sha256']
    data = path.read_bytes() if want else make_tokenizer(PrepareConfig(''), ()) # shards of others: GPT-2's
    if want and hashlib.sha256(data).hexdigest() != want:
        raise ValueError(f"{path}: not the tokenizer of this run")
    return model, read_tokenizer(data, path), meta['stream']['eot']

def ask_model(model):
    """ a nanoarc Model -> ask(context (n,), endings (b, L)) -> (b, L, vocab_size) logits that foretell the endings. the context is read once """
    def ask(context, ends):
        cache = model.cache()
        first = model(context[None], cache=cache)[0][:, -1:]
        cache.keep(torch.zeros(len(ends), dtype=torch.int64, device=ends.device))
        return torch.cat([first.expand(len(ends), -1, -1), model(ends[:, :-1], cache=cache)[0]], 1) if ends.size(1) > 1 else first.expand(len(ends), -1, -1)
    return ask

def ask_transformers(model):
    """ the same of a Hugging Face model. one whose layers do not all keep plain keys and values reads the context with each ending """
    from transformers import cache_utils
    plain = cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer
    def ask(context, ends):
        b, n = len(ends), len(context)
        if ask.cached:
            out = model(context[None], use_cache=True)
            cache = out.get('past_key_values')
            ask.cached = isinstance(cache, cache_utils.DynamicCache) and all(type(x) in plain for x in cache.layers)
        if not ask.cached:
            return model(torch.cat([context.expand(b, -1), ends], 1)).logits[:, n - 1 : -1]
        cache.batch_repeat_interleave(b)
        return torch.cat([out.logits[:, -1:].expand(b, -1, -1), model(ends, past_key_values=cache).logits[:, :-1]], 1)
    ask.cached = True
    return ask

def load_language_model(name, device):
    """ a run of nanoarc, a directory or hub id of transformers, or a .gguf -> (ask, as above; encode(text, is it the beginning?) -> token ids) """
    if (Path(name) / 'ckpt').is_dir():
        model, tok, _ = load_run(name, device)
        return ask_model(model), lambda text, begins: tok.encode(text, add_special_tokens=False).ids
    need('transformers')
    from nanoarc.finetune import read_base
    model, tok = read_base(name, torch.float32)
    model = model.to(device)
    def encode(text, begins):
        ids = tok(text, add_special_tokens=begins)['input_ids'] # a beginning of its own, where the model is used to one
        return ids[:-1] if begins and len(ids) > 1 and ids[-1] == tok.eos_token_id else ids
    return ask_transformers(model), encode

@dataclass
class HellaswagConfig:
    model: str # out_dir of a run of text; or of transformers: a directory, a hub id, a .gguf
    file: str # hellaswag_val.jsonl, of github.com/rowanz/hellaswag
    limit: int = 0 # the first so many items. 0 = all
    device: str = 'auto' # 'auto' = cuda, else mps, else cpu
    dtype: str = 'auto' # as in train

def read_hellaswag(path):
    """ .jsonl -> list of (ctx, 4 endings, number of the right one). raises ValueError with file, line and field """
    items = []
    with open(path, 'rb') as f:
        for n, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                x = json.loads(line)
            except ValueError as e:
                raise ValueError(f"{path}: line {n}: {e}") from None
            if not isinstance(x, dict):
                raise ValueError(f"{path}: line {n}: want an object, got {type(x).__name__}")
            ctx, ends, label = (x.get(key) for key in ('ctx', 'endings', 'label'))
            if not isinstance(ctx, str) or not ctx:
                raise ValueError(f"{path}: line {n}, field 'ctx': want a text, got {str(ctx)[:40]!r}")
            if not isinstance(ends, list) or len(ends) != 4 or not all(isinstance(x, str) for x in ends):
                raise ValueError(f"{path}: line {n}, field 'endings': want 4 texts, got {str(ends)[:40]!r}")
            if type(label) is not int or not 0 <= label <= 3:
                raise ValueError(f"{path}: line {n}, field 'label': want 0 to 3, got {str(label)[:40]!r}")
            items.append((ctx, ends, label))
    if not items:
        raise ValueError(f"{path}: no items")
    return items

@torch.no_grad()
def ending_losses(ask, context, ends, device):
    """ token ids of a context and of its endings -> (b,) sum of the losses over each ending's tokens, nats, and (b,) their number """
    n = torch.tensor([len(x) for x in ends], device=device)
    idx = torch.zeros(len(ends), max(map(len, ends)), dtype=torch.int64, device=device) # what stands behind an ending nobody sees
    for row, x in zip(idx, ends):
        row[: len(x)] = torch.tensor(x)
    logits = ask(torch.tensor(context, device=device), idx).float()
    losses = F.cross_entropy(logits.flatten(0, 1), idx.flatten(), reduction='none').view_as(idx) # (b, L)
    return losses.masked_fill(torch.arange(idx.size(1), device=device) >= n[:, None], 0).sum(1), n

def hellaswag(cfg):
    """ text hellaswag --model M --file F: how often is the right ending the most probable one? by the sum of its losses (acc), by their mean (acc_norm) """
    items = read_hellaswag(cfg.file)[: cfg.limit or None]
    device, _, autocast = train.get_device(cfg.device, cfg.dtype)
    rank, world = train.get_ranks(device)
    ask, encode = load_language_model(cfg.model, device)
    right, right_norm, n, began = 0, 0, 0, time.perf_counter()
    for ctx, ends, label in items[rank::world]:
        with autocast():
            total, count = ending_losses(ask, encode(ctx, True), [encode(" " + x, False) for x in ends], device)
        right, right_norm, n = right + int(total.argmin() == label), right_norm + int((total / count).argmin() == label), n + 1 # waits for the device
        if rank == 0 and n % 50 == 0:
            print(f"{n * world}/{len(items)} acc {right / n:.4f} acc_norm {right_norm / n:.4f}, {n * world / (time.perf_counter() - began):.1f} items / s", flush=True)
    right, right_norm, n = (int(x) for x in train.over_ranks(world, 'SUM', right, right_norm, n))
    result = {'items': n, 'acc': right / n, 'acc_norm': right_norm / n}
    if rank == 0:
        print(json.dumps(result))
    return result

@dataclass
class SampleConfig:
    model: str # out_dir of a run of text
    prompt: str = '' # what to go on from. '' = the beginning of a document
    num: int = 3 # samples
    most: int = 100 # tokens of each, unless the document ends before
    temperature: float = 0.8 # 0 = the most probable token, always
    top_k: int = 50 # only so many of the most probable tokens. 0 = off
    top_p: float = 1.0 # only the most probable tokens that make up this much together
    seed: int = 1337 # of the draws
    device: str = 'auto' # 'auto' = cuda, else mps, else cpu

def draw_tokens(logits, cfg, generator):
    """ (B, vocab_size) -> (B,) tokens """
    if cfg.temperature == 0:
        return logits.argmax(-1)
    if 0 < cfg.top_k < logits.size(1):
        logits = logits.masked_fill(logits < logits.topk(cfg.top_k).values[:, -1:], float('-inf'))
    return solve.draw(logits, cfg.temperature, cfg.top_p, generator)

@torch.no_grad()
def sample(cfg):
    """ text sample --model DIR --prompt P: what the model says """
    if cfg.num < 1 or cfg.most < 1 or cfg.temperature < 0 or cfg.top_k < 0 or not 0 < cfg.top_p <= 1:
        raise ValueError(f"num={cfg.num} most={cfg.most} temperature={cfg.temperature} top_k={cfg.top_k} top_p={cfg.top_p}: want at least 1, no negative number, a share of 0..1")
    device = train.get_device(cfg.device, 'float32')[0]
    model, tok, eot = load_run(cfg.model, device)
    prompt = tok.encode(cfg.prompt, add_special_tokens=False).ids or [eot]
    cache, generator, rows = model.cache(), torch.Generator(device).manual_seed(cfg.seed), []
    logits = model(torch.tensor([prompt], device=device), cache=cache)[0][:, -1].expand(cfg.num, -1)
    cache.keep(torch.zeros(cfg.num, dtype=torch.int64, device=device))
    for _ in range(cfg.most):
        rows.append(draw_tokens(logits[:, : tok.get_vocab_size()], cfg, generator)) # the vocabulary was rounded up
        if all(eot in row for row in torch.stack(rows, 1).tolist()):
            break
        logits = model(rows[-1][:, None], cache=cache)[0][:, -1]
    texts = []
    for row in torch.stack(rows, 1).tolist():
        texts.append(cfg.prompt + tok.decode(row[: row.index(eot)] if eot in row else row))
        print(f"{texts[-1]}\n---")
    return texts
