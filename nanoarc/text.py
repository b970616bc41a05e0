"""
text: token shards of any corpus, and a loader of them with the promises of the ARC loader. a directory of shards, in
the format of build-nanogpt (.npy) or of llm.c and modded-nanogpt (.bin):

    edufineweb_val_000000.npy     uint16 tokens, document after document, each begun by the end-of-text token.
    edufineweb_train_000001.npy   .bin: 256 int32 first (magic, version, number of tokens), then the same tokens
    tokenizer.json                made the tokens
    manifest.json                 sizes and sha256 of the shards. written last: without it some are missing
"""
import hashlib
import importlib.util
import io
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from nanoarc import checkpoint
from nanoarc.corpus import hash_file, read_json
from nanoarc.data import EPOCH, ArcLoader, Buffers, bijection, hash64, mix, split
from nanoarc.settings import check_numbers, differences

MAGIC, VERSION = 20240520, 1 # of .bin, github.com/karpathy/llm.c dev/data/data_common.py
ENCODED = 2**21 # characters that are encoded together
GPT2_VOCAB = 50257 # for shards without a manifest, which others made

@dataclass
class TextConfig:
    # a directory of token shards, as nanoarc text prepare writes it: train on them in place of ARC
    text: str = ''
    block_size: int = 1024 # tokens of a row
    batch_tokens: int = 8192 # tokens of a micro batch, over all ranks: a multiple of block_size
    # rows: 'shuffle' = each window of block_size once an epoch | 'sequential' = shard after shard, as build-nanogpt's
    # DataLoaderLite
    order: str = 'shuffle'
    val_tokens: int = 131072 # the validation loss is over the first so many tokens of the validation shard. 0 = none
    check_shards: bool = True # hash every shard before training, about a second a GB

    def check(self):
        """ raises ValueError that names the setting """
        if self.order not in ('shuffle', 'sequential'):
            raise ValueError(f"order={self.order!r}: want shuffle or sequential")
        check_numbers(self, dict(block_size=1, batch_tokens=1))
        if self.batch_tokens % self.block_size:
            raise ValueError(f"block_size={self.block_size} batch_tokens={self.batch_tokens}: want batch_tokens a "
                             "multiple of block_size")

def model_config(cfg, directory):
    """ a ModelConfig -> one for the tokens of a directory: their vocabulary, and places along the row """
    vocab_size = read_manifest(directory)['vocab_size']
    return replace(cfg, rope_bases=(10000.0,), frames='', n_task=0, vocab_size=-(-vocab_size // 64) * 64) # rounded up

def need(*names):
    """ raises ValueError if one of these packages is not here """
    missing = [name for name in names if not importlib.util.find_spec(name)]
    if missing:
        extra = 'finetune' if 'transformers' in missing else 'text'
        raise ValueError(f"this wants {' and '.join(missing)}: pip install 'nanoarc[{extra}]'")

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
    """ .npy or .bin -> (n,) uint16, mapped and not read into memory. raises ValueError that names the file """
    if path.suffix == '.npy':
        try:
            x = np.load(path, mmap_mode='r', allow_pickle=False)
        except (ValueError, EOFError) as e: # numpy does not name the file
            raise ValueError(f"{path}: {e}") from None
        if x.dtype != np.uint16 or x.ndim != 1:
            raise ValueError(f"{path}: want uint16 tokens in one dimension, got {x.dtype} in {x.ndim}")
        return np.asarray(x)
    size = path.stat().st_size
    magic, version, n = np.fromfile(path, np.int32, 3) if size >= 1024 else (0, 0, 0)
    if (magic, version) != (MAGIC, VERSION) or size != 1024 + 2 * n:
        raise ValueError(f"{path}: magic {magic}, version {version}, {n} tokens in {size} bytes: "
                         f"want {MAGIC}, {VERSION}, and 1024 bytes + 2 a token")
    return np.asarray(np.memmap(path, np.uint16, 'r', 1024))

def read_manifest(path):
    """ a directory of shards -> its manifest. without one, the shards are taken for GPT-2's. raises ValueError """
    path = Path(path)
    file = path / 'manifest.json'
    if file.is_file():
        manifest = read_json(file)
        check_fields(manifest, ('vocab_size', 'eot', 'tokenizer_sha256', 'shards'), file)
        for shard in manifest['shards']:
            check_fields(shard, ('name', 'tokens', 'sha256'), file)
        return manifest
    if (path / 'prepare.json').is_file():
        raise ValueError(f"{path}: nanoarc text prepare has not finished here, run it again")
    names = []
    for x in sorted(path.glob('*')):
        if x.suffix in ('.npy', '.bin') and ('train' in x.name or 'val' in x.name):
            names.append(x.name)
    kinds = {Path(name).suffix for name in names}
    if len(kinds) != 1:
        raise ValueError(f"{path}: {'both .npy and .bin' if kinds else 'no'} shards here, want NAME_train_000001.npy "
                         "or .bin, as nanoarc text prepare writes them")
    shards = [{'name': name} for name in names]
    return {'vocab_size': GPT2_VOCAB, 'eot': GPT2_VOCAB - 1, 'tokenizer_sha256': '', 'shards': shards}

def check_fields(obj, names, file):
    for name in names:
        if not isinstance(obj, dict) or name not in obj:
            raise ValueError(f"{file}: no field {name!r}")

# -----------------------------------------------------------------------------
# the loader

class TextDataset:
    """
    the stream of text. batch k is a function of (seed, k) for any k >= 0, on any number of ranks. order='sequential':
    of (k, rank, world), since each rank goes on to the next shard when its own rows would not fit, as in build-nanogpt.
    rows that would cross the end of a shard are left out, and so are shards shorter than that. raises ValueError that
    names a shard if it is not what the manifest says.
    """

    rows, leaks, val_pairs = {}, (), () # there are no tasks

    def __init__(self, cfg, seed=1337):
        cfg.check()
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed}: want a seed of 64 bits")
        self.cfg, self.seed, self.path = cfg, seed, Path(cfg.text)
        self.batch_rows = cfg.batch_tokens // cfg.block_size
        manifest = read_manifest(cfg.text)
        self.vocab_size, self.eot = manifest['vocab_size'], manifest['eot']
        self.tokenizer_sha256 = manifest['tokenizer_sha256']
        self.train, self.val = [], [] # shards
        self.names = [] # of those in train
        hashes = []
        for x in manifest['shards']:
            shard, sha256 = self.open(x)
            hashes.append((x['name'], sha256))
            if 'train' in x['name']:
                self.train.append(shard)
                self.names.append(x['name'])
            else:
                self.val.append(shard)
        self.corpus_sha256 = hashlib.sha256(repr((self.tokenizer_sha256, *hashes)).encode()).hexdigest()
        self.files = {} # what a run keeps beside the checkpoint
        if self.tokenizer_sha256:
            self.files['tokenizer.json'] = (self.path / 'tokenizer.json').read_bytes()
            if hashlib.sha256(self.files['tokenizer.json']).hexdigest() != self.tokenizer_sha256:
                raise ValueError(f"{self.path / 'tokenizer.json'}: not the one by which the shards were made")
        self.sizes = np.array([len(shard) for shard in self.train], np.int64)
        windows = np.maximum(self.sizes // cfg.block_size - 1, 0) # rows that fit into each shard, one less for a shift
        self.first = np.append(0, np.cumsum(windows)) # windows before each shard
        least = cfg.batch_tokens + 1 if cfg.order == 'sequential' else 2 * cfg.block_size
        self.num_short = int((self.sizes < least).sum())
        if self.num_short == len(self.sizes):
            raise ValueError(f"{self.path}: no training shard of {least} tokens or more, of {len(self.sizes)}: "
                             "a smaller block_size or batch_tokens would do")

    def open(self, x):
        """ a shard of the manifest -> its tokens and sha256. raises ValueError """
        path = self.path / x['name']
        shard = open_shard(path)
        if len(shard) != x.get('tokens', len(shard)):
            raise ValueError(f"{path}: {len(shard):,} tokens, the manifest says {x['tokens']:,}")
        if 'sha256' in x and not self.cfg.check_shards:
            return shard, x['sha256']
        found = hash_file(path)
        if found != x.get('sha256', found):
            raise ValueError(f"{path}: damaged or changed, its sha256 is {found[:12]}, "
                             f"the manifest says {x['sha256'][:12]}")
        if 'sha256' not in x and len(shard) and shard.max() >= self.vocab_size:
            raise ValueError(f"{path}: token {shard.max()}, without a manifest.json they are taken for GPT-2's, "
                             f"less than {self.vocab_size}")
        return shard, found

    def __len__(self):
        return int(self.sizes.sum())

    def loader(self, rank=0, world=1, device='cpu', prefetch=True):
        return TextLoader(self, rank, world, device, prefetch)

    def about(self):
        """ a line of counts: what is here, and what is not """
        val = len(self.val_starts()) * self.cfg.block_size
        return (f"{len(self.train)} shards, {len(self):,} tokens, vocabulary {self.vocab_size:,}, {val:,} tokens of "
                f"validation; left out: {self.num_short} shards too short")

    def trained_on(self):
        """ no query of a task """
        return ''

    def places(self, k, rank, world):
        """ number of a global batch -> (B,) the shard of each of this rank's rows, (B,) where the row begins there """
        a, b = split(self.batch_rows, rank, world)
        if self.cfg.order == 'shuffle':
            return self.shuffled(k * self.batch_rows + np.arange(a, b))
        T = self.cfg.block_size
        G = self.batch_rows * T # tokens of a batch
        # how many batches this rank has from each shard. it leaves one, as in build-nanogpt, when place + G + 1 > size
        batches = np.maximum((self.sizes - 1 - a * T) // G, 1)
        batches[self.sizes <= G] = 0
        ends = np.cumsum(batches)
        k = k % int(ends[-1]) # after the last shard comes the first
        s = int(np.searchsorted(ends, k, 'right'))
        in_shard = k - (ends[s] - batches[s])
        return np.full(b - a, s), in_shard * G + np.arange(a, b) * T

    def shuffled(self, i):
        """
        (n,) numbers of rows in the stream -> (n,) their shards, (n,) where they begin there. each shard is cut into
        windows of T tokens. an epoch has each window once, in an order of its own, and cuts each shard 0 to T-1 tokens
        later than at its beginning
        """
        T, total = self.cfg.block_size, int(self.first[-1])
        epoch, i = np.divmod(i.astype(np.uint64), np.uint64(total))
        key = hash64(self.seed, EPOCH, epoch)
        window = bijection(i, np.uint64(total), key).astype(np.int64)
        shard = np.searchsorted(self.first, window, side='right') - 1
        shift = mix(key, shard.astype(np.uint64)) % np.uint64(T)
        return shard, (window - self.first[shard]) * T + shift.astype(np.int64)

    def fill(self, batch, shards, shard, start):
        """ rows of shards into a Batch. slices will do: over 300M tokens/s on a core, and an H200 trains on 0.5M """
        T = self.cfg.block_size
        rows = np.empty((len(shard), T + 1), np.uint16)
        for r, (s, at) in enumerate(zip(shard.tolist(), start.tolist())):
            rows[r] = shards[s][at : at + T + 1]
        batch.idx.numpy()[:] = rows[:, :-1]
        batch.targets.numpy()[:] = rows[:, 1:]
        return batch

    def val_starts(self):
        """ where the rows of validation begin in the validation shard """
        if not self.val:
            return np.arange(0)
        tokens = min(self.cfg.val_tokens, len(self.val[0]) - 1)
        return np.arange(tokens // self.cfg.block_size) * self.cfg.block_size

    def val_batches(self, rank=0, world=1):
        """ the first val_tokens tokens of the first validation shard, in rows of block_size """
        starts, T = self.val_starts(), self.cfg.block_size
        for i in range(0, len(starts), self.batch_rows):
            mine = starts[i : i + self.batch_rows]
            a, b = split(len(mine), rank, world)
            if a < b:
                batch = Buffers((b - a) * T, tasked=False, xy=True).shaped(b - a, T)
                yield self.fill(batch, self.val, np.zeros(b - a, np.int64), mine[a:b])

class TextLoader(ArcLoader):
    """
    an ArcLoader whose batches are rows of shards: the same thread, ring of buffers and state. its place in the stream
    is (0, number of the batch), for there are no windows to plan
    """

    def after(self, window, batch):
        return window, batch + 1

    def tokens(self):
        return self.ds.cfg.batch_tokens

    def loss_tokens(self, n=1):
        return n * self.ds.cfg.batch_tokens

    def names(self, window, batch, n=1):
        """ of the shards in this rank's rows of n global batches """
        names = set()
        for k in range(batch, batch + n):
            shard, _ = self.ds.places(k, self.rank, self.world)
            names.update(self.ds.names[s] for s in shard)
        return sorted(names)

    def write(self, place, turn):
        shard, start = self.ds.places(place[1], self.rank, self.world)
        B, T = max(len(shard), 1), self.ds.cfg.block_size
        buffers = self.ring[turn]
        if buffers is None:
            buffers = self.ring[turn] = Buffers(B * T, tasked=False, xy=True, pin=self.device.type == 'cuda')
        if buffers.copied is not None: # on cuda: the copy out of here may still be on its way
            buffers.copied.synchronize()
        batch = buffers.shaped(B, T)
        if len(shard) == 0: # there are more ranks than rows: a row without loss
            batch.idx[:] = 0
            batch.targets[:] = -100
            return batch
        return self.ds.fill(batch, self.ds.train, shard, start)

    def state_dict(self):
        """ as in ArcLoader. the directory may move, its shards may not change """
        state = super().state_dict()
        for name in ('text', 'check_shards'):
            state.pop(name)
        return {**state, 'tokenizer_sha256': self.ds.tokenizer_sha256, 'eot': self.ds.eot}

# -----------------------------------------------------------------------------
# prepare

@dataclass
class PrepareConfig:
    # a text dataset of the Hugging Face hub, e.g. HuggingFaceFW/fineweb-edu, or a .txt, .jsonl or .parquet here, or a
    # directory of those
    dataset: str
    name: str = '' # of a configuration of the dataset, e.g. sample-10BT
    split: str = 'train' # of the dataset
    column: str = 'text' # that holds the text, of .jsonl and .parquet too. a .txt is one document
    out_dir: str = 'data/text' # where the shards go
    # shards are called STEM_train_000001. '' = edufineweb, or the last part of the dataset's name
    stem: str = ''
    format: str = 'npy' # of the shards: 'npy' = as in build-nanogpt | 'bin' = as in llm.c and modded-nanogpt
    shard_tokens: int = 100_000_000 # tokens of a shard. the first is for validation
    max_tokens: int = 0 # stop after so many. 0 = all
    tokenizer: str = 'gpt2' # 'gpt2' = by tiktoken, which fetches it | a tokenizer.json, or a directory with one
    # make a byte-level BPE of so many tokens from the first 100 MB of the text, in place of tokenizer. 0 = off
    train_bpe: int = 0
    eot: str = '<|endoftext|>' # the token before each document, by its name in the tokenizer

    def check(self):
        """ raises ValueError that names the setting """
        if self.format not in ('npy', 'bin'):
            raise ValueError(f"format={self.format!r}: want npy or bin")
        check_numbers(self, dict(shard_tokens=1), dict(max_tokens=2**53))
        if self.train_bpe != 0 and not 300 <= self.train_bpe <= 2**16:
            raise ValueError(f"train_bpe={self.train_bpe}: want 300 to 65536")

def local_files(dataset):
    """ -> sorted list of (path, name in the directory) to read, [] if the dataset is on the hub. raises ValueError """
    path = Path(dataset)
    kinds = '.txt', '.jsonl', '.parquet'
    if path.is_file() and path.suffix in kinds:
        return [(path, path.name)]
    found = []
    if path.is_dir():
        for x in path.rglob('*'):
            if x.suffix in kinds and x.is_file() and not x.name.startswith('.'):
                found.append((x, x.relative_to(path).as_posix()))
    if not found and (path.exists() or dataset.startswith(('.', '/', '~')) or path.suffix in kinds):
        nothing = '' if path.exists() else ', and here is nothing'
        raise ValueError(f"{dataset}: want a .txt, .jsonl or .parquet, or a directory of those{nothing}")
    return sorted(found, key=lambda x: x[1])

def checked(text, where):
    """ a text -> itself. raises ValueError if it is none """
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
        return hub_documents(cfg, skip, revision)
    return islice(local_documents(files, cfg.column), skip, None) # reading is far faster than encoding

def hub_documents(cfg, skip, revision):
    from datasets import load_dataset
    rows = load_dataset(cfg.dataset, cfg.name or None, split=cfg.split, revision=revision, streaming=True)
    for n, row in enumerate(rows.skip(skip), skip):
        yield checked(row.get(cfg.column), f"{cfg.dataset}: document {n}, field {cfg.column!r}")

def local_documents(files, column):
    for path, _ in files:
        if path.suffix == '.parquet':
            yield from parquet_documents(path, column)
        elif path.suffix == '.jsonl':
            yield from jsonl_documents(path, column)
        else:
            yield txt_document(path)

def parquet_documents(path, column):
    import polars as pl
    try:
        known = pl.read_parquet_schema(path)
    except pl.exceptions.PolarsError as e:
        raise ValueError(f"{path}: {e}") from None
    if column not in known:
        raise ValueError(f"{path}: no field {column!r}, it has {', '.join(known)}")
    frame, n = pl.scan_parquet(path).select(column), 0
    while len(part := frame.slice(n, 1000).collect()) > 0:
        for x in part.to_series():
            yield checked(x, f"{path}: row {n}, field {column!r}")
            n += 1

def json_object(line, where, want="an object"):
    """ a line of .jsonl -> dict. raises ValueError """
    try:
        x = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: {e}") from None
    if not isinstance(x, dict):
        raise ValueError(f"{where}: want {want}, got {type(x).__name__}")
    return x

def jsonl_documents(path, column):
    with open(path, 'rb') as f:
        for n, line in enumerate(f, 1):
            if not line.strip():
                continue
            x = json_object(line, f"{path}: line {n}", f"an object with a field {column!r}")
            yield checked(x.get(column), f"{path}: line {n}, field {column!r}")

def txt_document(path):
    try:
        text = path.read_bytes().decode('utf-8-sig')
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: {e}") from None
    return checked(text, f"{path}")

# -----------------------------------------------------------------------------
# tokenizers

def byte_level(model):
    """ a model of tokenizers -> Tokenizer that splits text as GPT-2 does, without special tokens yet """
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    tok = Tokenizer(model)
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    return tok

def byte_chars():
    """ -> {byte: the character by which GPT-2 writes it}: itself if it is visible, the others from 256 on """
    chars = {}
    for b in [*range(33, 127), *range(161, 173), *range(174, 256)]:
        chars[b] = chr(b)
    hidden = [b for b in range(256) if b not in chars]
    for n, b in enumerate(hidden):
        chars[b] = chr(256 + n)
    return chars

def from_ranks(ranks, special):
    """
    a BPE of tiktoken, {bytes: rank}, that splits text as GPT-2 does -> the same as a Tokenizer, special tokens last.
    tiktoken keeps the rank of each token, tokenizers wants the two tokens that were merged into it
    """
    from tokenizers import models
    chars = byte_chars()
    def text(token):
        return "".join(chars[b] for b in token)
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda x: x[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2: # apply the merges of lower rank, the lowest first, until two parts are left
            joined = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = joined.index(min(joined))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((text(parts[0]), text(parts[1])))
    vocab = {text(token): rank for token, rank in ranks.items()}
    tok = byte_level(models.BPE(vocab, merges))
    tok.add_special_tokens(special)
    return tok

def train_tokenizer(cfg, texts):
    """ a BPE made from the first 100 MB of texts """
    from tokenizers import models, pre_tokenizers, trainers
    def first(size=100 * 2**20):
        for text in texts:
            yield text
            size -= len(text)
            if size < 0:
                return
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = byte_level(models.BPE())
    tok.train_from_iterator(first(), trainers.BpeTrainer(vocab_size=cfg.train_bpe, special_tokens=[cfg.eot],
                                                         show_progress=False, initial_alphabet=alphabet))
    return tok

def make_tokenizer(cfg, texts):
    """ -> the bytes of a tokenizer.json: GPT-2's, one from a file, or one made from texts. raises ValueError """
    if cfg.train_bpe:
        return train_tokenizer(cfg, texts).to_str().encode()
    if cfg.tokenizer == 'gpt2':
        need('tiktoken')
        from tiktoken_ext.openai_public import gpt2
        try:
            x = gpt2()
        except OSError as e: # also what requests raises
            raise ValueError(f"tokenizer 'gpt2': tiktoken cannot fetch it here ({type(e).__name__}): "
                             "--train_bpe 8192, or --tokenizer with a tokenizer.json") from None
        return from_ranks(x['mergeable_ranks'], list(x['special_tokens'])).to_str().encode()
    path = Path(cfg.tokenizer)
    if path.is_dir():
        path = path / 'tokenizer.json'
    if not path.is_file():
        raise ValueError(f"tokenizer {cfg.tokenizer!r}: want gpt2, a tokenizer.json or a directory with one")
    return path.read_bytes()

def read_tokenizer(data, where):
    """ bytes of a tokenizer.json -> Tokenizer that takes "<|endoftext|>" in a text for text. raises ValueError """
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
    """ texts -> (n,) uint16 tokens of each, end-of-text first. a batch is encoded while the next is read """
    def encode(batch):
        encoded = tok.encode_batch_fast(batch, add_special_tokens=False)
        return [np.array([eot, *x.ids], np.uint16) for x in encoded]
    batch, size = [], 0
    ahead = None # the batch that is being encoded
    with ThreadPoolExecutor(1) as pool:
        for text in texts:
            batch.append(text)
            size += len(text) + 100
            if size > ENCODED:
                ready, ahead = ahead, pool.submit(encode, batch)
                batch, size = [], 0
                if ready:
                    yield from ready.result()
        if ahead:
            yield from ahead.result()
    yield from encode(batch)

# -----------------------------------------------------------------------------

def check_disk(cfg, files, done):
    """ raises ValueError if what is to come would not fit: a token for three bytes of text, where the size is known """
    size = 0
    for path, _ in files:
        size += path.stat().st_size * (2 if path.suffix == '.parquet' else 1)
    if not files:
        from datasets import load_dataset_builder
        splits = load_dataset_builder(cfg.dataset, cfg.name or None).info.splits or {}
        if cfg.split in splits:
            size = splits[cfg.split].num_bytes or 0
    tokens = size / 3 or 2 * cfg.shard_tokens
    if cfg.max_tokens:
        tokens = min(tokens, cfg.max_tokens)
    size, free = 2 * (tokens - done), shutil.disk_usage(cfg.out_dir).free
    if size > free:
        raise ValueError(f"{cfg.out_dir}: about {size / 1e9:.1f} GB of shards are to come, "
                         f"{free / 1e9:.1f} GB are free")

class Preparation:
    """
    a directory of shards while it is made. state is what prepare.json holds, written after each shard: by it the same
    command goes on after a kill
    """

    def __init__(self, cfg, files):
        self.cfg, self.files, self.out = cfg, files, Path(cfg.out_dir)
        self.stem = cfg.stem
        if not self.stem:
            is_edu = cfg.dataset.endswith('fineweb-edu')
            self.stem = 'edufineweb' if is_edu else Path(cfg.dataset).stem.lower()
        if 'train' in self.stem or 'val' in self.stem:
            raise ValueError(f"stem={self.stem!r}: 'train' and 'val' in the name of a shard say what it is for, "
                             "choose another --stem")

    def settings(self):
        """ what must be the same to go on """
        stamps = []
        for path, name in self.files:
            stamps.append([name, path.stat().st_size, path.stat().st_mtime_ns])
        settings = {**asdict(self.cfg), 'stem': self.stem, 'files': stamps}
        settings.pop('out_dir')
        return settings

    def read(self, name):
        """ manifest.json or prepare.json, None if there is none. raises ValueError if other settings made it """
        if not (self.out / name).is_file():
            return None
        state = read_json(self.out / name)
        check_fields(state, ('settings', 'revision', 'tokenizer_sha256', 'shards'), self.out / name)
        wrong = differences(state['settings'], self.settings(), 'there')
        if wrong:
            raise ValueError(f"{self.out} holds shards made otherwise, choose another --out_dir: {'; '.join(wrong)}")
        return state

    def begin(self):
        """ the tokenizer, and a state without a shard """
        foreign = [x.name for x in self.out.iterdir() if x.suffix in ('.npy', '.bin')]
        if foreign:
            raise ValueError(f"{self.out} holds shards of others, e.g. {foreign[0]}: choose another --out_dir")
        revision = None
        if not self.files: # a dataset of the hub may change meanwhile
            from huggingface_hub import HfApi
            revision = HfApi().dataset_info(self.cfg.dataset).sha
        check_disk(self.cfg, self.files, 0)
        data = make_tokenizer(self.cfg, documents(self.cfg, self.files, 0, revision))
        checkpoint.write_file(self.out / 'tokenizer.json', data)
        self.state = {'settings': self.settings(), 'revision': revision, 'documents': 0, 'used': 0, 'shards': [],
                      'tokenizer_sha256': hashlib.sha256(data).hexdigest()}
        self.save()

    def save(self):
        checkpoint.write_file(self.out / 'prepare.json', json.dumps(self.state).encode())

    def open(self):
        """ the tokenizer. raises ValueError if it or a shard is not what it was, or if its tokens will not do """
        path = self.out / 'tokenizer.json'
        self.tok = read_tokenizer(path.read_bytes(), path)
        if hash_file(path) != self.state['tokenizer_sha256']:
            raise ValueError(f"{path}: changed since these shards were begun")
        self.vocab_size, self.eot = self.tok.get_vocab_size(), self.tok.token_to_id(self.cfg.eot)
        if self.eot is None or self.vocab_size > 2**16:
            (self.out / 'prepare.json').unlink() # there are no shards yet, nothing is lost
            has = 'none' if self.eot is None else 'one'
            raise ValueError(f"tokenizer {self.cfg.tokenizer!r}: {self.vocab_size:,} tokens, {has} called "
                             f"{self.cfg.eot!r}: want at most 65,536, and --eot one of them")
        for k, x in enumerate(self.state['shards']):
            if x['name'] != self.shard_name(k):
                raise ValueError(f"{self.out / 'prepare.json'}: shard {x['name']!r}, want {self.shard_name(k)}")
            if len(open_shard(self.out / x['name'])) != x['tokens']:
                raise ValueError(f"{self.out / x['name']}: changed since it was written")

    def shard_name(self, k):
        return f"{self.stem}_{'train' if k else 'val'}_{k:06d}.{self.cfg.format}"

    def done(self):
        """ tokens in shards """
        return sum(x['tokens'] for x in self.state['shards'])

    def write_shard(self, tokens, number, used):
        """ tokens that end after so many documents, and so many tokens of the next one """
        name = self.shard_name(len(self.state['shards']))
        data = shard_bytes(tokens, self.cfg.format)
        checkpoint.write_file(self.out / name, data)
        shard = {'name': name, 'tokens': len(tokens), 'sha256': hashlib.sha256(data).hexdigest()}
        self.state.update(documents=number, used=used, shards=[*self.state['shards'], shard])
        self.save()
        speed = (self.done() - self.before) / (time.perf_counter() - self.began)
        print(f"{name}: {len(tokens):,} tokens, {number:,} documents so far, {speed:,.0f} tokens / s", flush=True)

    def write_shards(self):
        """ the rest of the dataset -> tokens and documents in all """
        cfg = self.cfg
        self.before, self.began = self.done(), time.perf_counter()
        shard, n = np.empty(cfg.shard_tokens, np.uint16), 0 # the shard to come, and tokens in it
        done, last = self.before, cfg.max_tokens or float('inf') # tokens so far, tokens in the end
        number, used = self.state['documents'], self.state['used'] # documents so far, and tokens of the next one
        texts = documents(cfg, self.files, number, self.state['revision'])
        for tokens in tokenized(texts, self.tok, self.eot):
            while used < len(tokens) and done < last: # a long document may fill several shards
                room = min(cfg.shard_tokens - n, last - done)
                x = tokens[used : used + room]
                shard[n : n + len(x)] = x
                n, used, done = n + len(x), used + len(x), done + len(x)
                if n == cfg.shard_tokens:
                    self.write_shard(shard, number, used)
                    n = 0
            if done >= last:
                break
            number, used = number + 1, 0
        if len(self.state['shards']) + (n > 0) < 2:
            for name in ['prepare.json', *(x['name'] for x in self.state['shards'])]:
                (self.out / name).unlink()
            raise ValueError(f"{cfg.dataset}: {done:,} tokens fill one shard, which is for validation: "
                             "want --shard_tokens of less than half")
        if n > 0:
            self.write_shard(shard[:n], number, used)
        return done, number

def prepare(cfg):
    """ text prepare --dataset D: a corpus -> token shards. killed at any moment, the same command goes on """
    cfg.check()
    files = local_files(cfg.dataset)
    need('tokenizers', *([] if files else ['datasets'])) # before anything is begun
    work = Preparation(cfg, files)
    with checkpoint.lock(work.out):
        manifest = work.read('manifest.json')
        if manifest:
            (work.out / 'prepare.json').unlink(missing_ok=True)
            print(f"{work.out}: done already")
            return manifest
        work.state = work.read('prepare.json')
        if work.state is None:
            work.begin()
        work.open()
        check_disk(cfg, files, work.done())
        if work.done():
            print(f"going on after {len(work.state['shards'])} shards, {work.done():,} tokens")
        tokens, number = work.write_shards()
        manifest = {key: work.state[key] for key in ('settings', 'revision', 'tokenizer_sha256', 'shards')}
        manifest.update(vocab_size=work.vocab_size, eot=work.eot, documents=number, tokens=tokens)
        checkpoint.write_file(work.out / 'manifest.json', json.dumps(manifest, indent=1).encode())
        (work.out / 'prepare.json').unlink()
        print(f"{work.out}: {len(manifest['shards'])} shards, {tokens:,} tokens of {number:,} documents, "
              f"vocabulary {work.vocab_size:,}")
        return manifest
