"""
the loader once more, in plain python: no numpy, no numba, no line in common with nanoarc/data.py. slow, and what the
kernels are compared with, byte for byte. a grid is a list of lists here.
"""
from math import ceil, factorial, floor, log2

ROW, IN, OUT, END, PAD = 10, 11, 12, 13, 14
DIHEDRAL, COLORS, IDENTITY, EPOCH, DEMOS, BATCHES, ROWS, POOL = range(8)

def hash64(*parts, h=0):
    """ a chain of splitmix64 finalizers, from h on """
    M = 2**64 - 1
    for x in parts:
        h = ((h ^ int(x)) + 0x9e3779b97f4a7c15) & M
        h = ((h ^ (h >> 30)) * 0xbf58476d1ce4e5b9) & M
        h = ((h ^ (h >> 27)) * 0x94d049bb133111eb) & M
        h ^= h >> 31
    return h

def bijection(i, n, key):
    half = max(ceil(log2(n) / 2), 1)
    while True:
        left, right = i >> half, i % 2**half
        for k in range(4):
            left, right = right, left ^ (hash64(key, k, right) % 2**half)
        i = left << half | right
        if i < n:
            return i

def turn(grid, d):
    """ transpose if d >= 4, then d % 4 quarter turns against the clock """
    if d >= 4:
        grid = [list(col) for col in zip(*grid)]
    for _ in range(d % 4):
        grid = [list(col) for col in zip(*grid)][::-1]
    return grid

def canonical(x, y):
    """ one object for all symmetries and color names of a pair """
    forms = []
    for d in range(8):
        names, form = {}, []
        for grid in (turn(x, d), turn(y, d)):
            for row in grid:
                form.append([names.setdefault(c, len(names)) for c in row])
            form.append([]) # ends a grid
        forms.append(form)
    return repr(min(forms))

class Pair:
    def __init__(self, task, x, y, kind, opened, source=0):
        self.task, self.kind, self.source = task, kind, source # kind: 'own', 'extra' or 'query'
        self.is_demo = kind != 'query'
        self.x = x.tolist()
        self.y = y.tolist() if opened or self.is_demo else None
        self.secret = canonical(x.tolist(), y.tolist())

    def tokens(self, d, answer=True):
        h, w = len(turn(self.x, d)), len(turn(self.x, d)[0])
        n = 2 + h * (w + 1)
        if answer and self.y is not None:
            h, w = len(turn(self.y, d)), len(turn(self.y, d)[0])
            n += h * (w + 1) + 1
        return n

    def need(self, d):
        """ a closed answer reserves room for the longest output of the demos that its task was published with """
        n = self.tokens(d)
        if self.y is None:
            sizes = []
            for p in self.task.own:
                for y in (p.y, turn(p.y, 4)):
                    sizes.append(len(y) * (len(y[0]) + 1))
            n += max(sizes) + 1 if sizes else 0
        return n

    def long(self):
        return max(self.need(0), self.need(4))

    def long_for(self, most):
        """ too large to be trained on? but the queries of a published task are only asked """
        return max(self.tokens(0), self.tokens(4)) > most and (self.is_demo or self.task.dealt)

class SlowTask:
    def __init__(self, task, repeat, in_data):
        self.name, self.key, self.repeat, self.in_data = task.name, task.key, repeat, in_data
        self.dealt = task.n_own == 0
        self.own = [Pair(self, x, y, 'own', in_data) for x, y in task.demos]
        self.extra = []
        self.queries = [Pair(self, x, y, 'query', in_data) for x, y in task.queries]

    @property
    def demos(self):
        return self.own + self.extra

    @property
    def pairs(self):
        return self.own + self.extra + self.queries

    def trained(self):
        """ the pairs whose answers training may see, but the own demos of adapt """
        return self.pairs if self.in_data else self.extra

    def remove(self, bad):
        """ without these pairs -> is the task still there? what was published goes whole """
        if not self.dealt and any(p in bad for p in self.own + self.queries):
            return False
        self.own, self.extra, self.queries = [[p for p in x if p not in bad]
                                              for x in (self.own, self.extra, self.queries)]
        return len(self.pairs) > 0

def add_extra(tasks, extra):
    """ list of (Task, repeat, number of the source): its pairs become extra pairs of the SlowTask of its id """
    by_id = {t.name: t for t in tasks}
    for task, repeat, source in extra:
        mine = by_id.get(task.name) or by_id.get(task.name.rpartition('.')[0])
        for x, y in task.demos + task.queries:
            if mine and y is not None:
                mine.dealt = False
                mine.extra.append(Pair(mine, x, y, 'extra', True, source))

class SlowLoader:
    """
    tasks: list of (Task with all answers, repeat, is it from data and not from adapt), cfg: DataConfig, extra: list of
    (Task, repeat, number of its source) whose pairs are further demos
    """

    def __init__(self, tasks, cfg, seed, window, extra=()):
        self.cfg, self.seed, self.window_size = cfg, seed, window
        tasks = [SlowTask(*x) for x in tasks]
        add_extra(tasks, extra)
        if cfg.max_pair:
            tasks = [t for t in tasks if t.remove([p for p in t.pairs if p.long_for(cfg.max_pair)])]
        asked = set()
        for t in tasks:
            if not t.in_data:
                asked.update(p.secret for p in t.queries)
        if cfg.drop_overlap:
            tasks = [t for t in tasks if t.remove([p for p in t.trained() if p.secret in asked])]
        self.pairs = []
        for t in tasks:
            self.pairs += t.pairs
        for i, p in enumerate(self.pairs):
            p.number = i
        rows = list(dict.fromkeys(t.key for t in tasks))
        for t in tasks:
            t.row = rows.index(t.key)
        # held out: the first of equal tasks, by key
        val = {}
        for t in tasks:
            if t.in_data and t.queries:
                val.setdefault(t.key, t)
        self.val = []
        for key in sorted(val)[: min(cfg.val_tasks, len(val) // 2)]:
            self.val += val[key].queries
        secrets = {q.secret for q in self.val}
        held = [p for p in self.pairs if p.y is not None and p.secret in secrets]
        self.usable = [p for p in self.pairs if p.is_demo and p not in held]
        self.pools = [] # lists of pairs: each alone, but the extra pairs of a task from one source
        for p in self.pairs:
            can = p.y is not None and (p.is_demo or p.task.in_data)
            if can and p not in held and p.long() <= cfg.block_size and not self.is_alone(p, p.task.demos):
                last = self.pools[-1][-1] if self.pools else p
                goes_on = p.task is last.task and p.source == last.source and p.kind == last.kind == 'extra'
                if goes_on and self.pools:
                    self.pools[-1].append(p)
                else:
                    self.pools.append([p])
        self.val = [p for p in self.val if p.long() <= cfg.block_size and not self.is_alone(p, p.task.own)]
        repeats = {source: repeat for _, repeat, source in extra}
        self.targets = [] # of an epoch: (pool, how many it has had before of how many)
        for pool in self.pools:
            times = repeats.get(pool[0].source, pool[0].task.repeat)
            n = min(len(pool), cfg.extra_pairs or len(pool)) * times
            self.targets += [(pool, i, n) for i in range(n)]

    def is_alone(self, p, demos):
        """ in context: does none of these demos fit before the pair? """
        others = [q for q in demos if q is not p and q in self.usable]
        return self.cfg.shots != 0 and not any(p.long() + q.long() <= self.cfg.block_size for q in others)

    def domain(self, task):
        mode = self.cfg.colors
        if mode == 'auto':
            mode = 'domain' if self.cfg.shots == 0 else 'nonzero'
        if mode != 'domain':
            return {'nonzero': list(range(1, 10)), 'all': list(range(10)), 'none': []}[mode]
        seen, made = set(), set()
        for p in task.own + task.queries:
            seen.update(*p.x)
        for p in task.own:
            made.update(*p.y)
        return [c for c in range(1, 10) if c in seen or c not in made]

    def target(self, t):
        """ number of a document -> the pair that is asked, and how often it was before """
        epoch, i = divmod(t, len(self.targets))
        pool, had, n = self.targets[bijection(i, len(self.targets), hash64(self.seed, EPOCH, epoch))]
        visit, k = divmod(epoch * n + had, len(pool))
        return pool[bijection(k, len(pool), hash64(self.seed, POOL, pool[0].number, visit))], visit

    def document(self, t):
        """ -> dict of lists: idx, targets, pos, and what the row needs """
        cfg, seed = self.cfg, self.seed
        target, visit = self.target(t)
        d = bijection(visit % 8, 8, hash64(seed, DIHEDRAL, target.number, visit // 8))
        domain = self.domain(target.task)
        total = factorial(len(domain))
        code = bijection(visit % total, total, hash64(seed, COLORS, target.number, visit // total))
        perm = list(domain)
        for j in range(len(domain)):
            code, k = divmod(code, len(domain) - j)
            perm[j], perm[j + k] = perm[j + k], perm[j]
        color = {**{c: c for c in range(10)}, **dict(zip(domain, perm))}
        if float(hash64(seed, IDENTITY, target.number, visit)) < cfg.p_identity * 2.0**64:
            color = {c: c for c in range(10)}
        demos, context, room = target.task.demos, [], cfg.block_size - target.need(d)
        for k in range(len(demos)):
            q = demos[bijection(k, len(demos), hash64(seed, DEMOS, t))]
            if len(context) not in (cfg.shots, len(target.task.own)) and q is not target and q in self.usable \
                    and q.need(d) <= room:
                context.append(q)
                room -= q.need(d)
        return {**self.tokens(context[::-1] + [target], d, color), 't': t, 'task': target.task.row, 'dihedral': d}

    def tokens(self, chain, d, color):
        """ pairs, the target last, under an augment -> idx, targets, pos """
        cfg, idx, pos, loss = self.cfg, [], [], []
        for k, p in enumerate(chain):
            z = 2 * (len(chain) - 1 - k)
            for mark, grid, depth in ((IN, turn(p.x, d), z), (OUT, turn(p.y, d), z + 1)):
                start = len(idx)
                idx.append(mark)
                pos.append((0, 0, depth))
                for r, row in enumerate(grid):
                    idx += [color[c] for c in row] + [ROW]
                    pos += [(r, c + 1, depth) for c in range(len(row))] + [(r + 1, 0, depth)]
            idx.append(END)
            pos.append((len(grid), 1, depth))
            counts = k == len(chain) - 1 or (cfg.loss_on == 'outputs' and k > 0)
            for n in range(len(loss), len(idx) - 1):
                loss.append(cfg.loss_on == 'all' or (counts and n >= start))
            loss.append(cfg.loss_on == 'all')
        nexts = idx[1:] + [None]
        targets = [y if on and y is not None else cfg.ignore_index for y, on in zip(nexts, loss)]
        return {'idx': idx, 'targets': targets, 'pos': pos}

    def pack(self, docs):
        """ documents -> rows of them, each document in the fullest row that has room, the longest first """
        rows = []
        def room(row):
            return self.cfg.block_size - sum(len(doc['idx']) for doc in row)
        for doc in sorted(docs, key=lambda doc: -len(doc['idx'])):
            best = None
            for row in rows:
                if room(row) >= len(doc['idx']) and (best is None or room(row) < room(best)):
                    best = row
            if best is None:
                rows.append([doc])
            else:
                best.append(doc)
        for row in rows:
            row.sort(key=lambda doc: doc['t'])
        return rows

    def batches(self, window):
        """ -> list of (rows, T), a row being a list of documents """
        cfg, T = self.cfg, self.cfg.block_size
        docs = [self.document(window * self.window_size + i) for i in range(self.window_size)]
        key = hash64(self.seed, BATCHES, window)
        if cfg.batching == 'bucket':
            def width(doc):
                n = len(doc['idx'])
                step = max(2 ** (floor(log2(n)) - 4), 4)
                return min(ceil(n / step) * step, T)
            docs.sort(key=width) # stable
            out = []
            for doc in docs:
                fits = out and (len(out[-1][0]) + 1) * width(doc) <= cfg.batch_tokens
                if fits and 16 * width(doc) <= 17 * width(out[-1][0][0][0]):
                    out[-1] = out[-1][0] + [[doc]], width(doc)
                else:
                    out.append(([[doc]], width(doc)))
        else:
            rows = [[doc] for doc in docs]
            if cfg.batching == 'pack':
                rows = self.pack(docs)
                order = sorted(range(len(rows)), key=lambda r: hash64(key, ROWS, r))
                rows = [rows[r] for r in order]
            B = max(cfg.batch_tokens // T, 1)
            m = ceil(len(rows) / B)
            out = [(rows[i * len(rows) // m : (i + 1) * len(rows) // m], T) for i in range(m)]
        order = sorted(range(len(out)), key=lambda j: hash64(key, j))
        return [out[j] for j in order]

    def write(self, rows, T):
        """ list of rows -> the six fields of a Batch as nested lists """
        fields = [[], [], [], [], [], []]
        for row in rows or [[]]: # no rows: one without loss
            line = [[], [], [], [], [], []]
            for n, doc in enumerate(row):
                size = len(doc['idx'])
                parts = [doc['idx'], doc['targets'], doc['pos']]
                parts += [[n] * size, [doc['task']] * size, [doc['dihedral']] * size]
                for out, x in zip(line, parts):
                    out += x
            rest = T - len(line[0])
            for out, x, empty in zip(fields, line, (PAD, self.cfg.ignore_index, (0, 0, 0), -1, 0, 0)):
                out.append([list(v) if isinstance(v, tuple) else v for v in x + [empty] * rest])
        return fields
