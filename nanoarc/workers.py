"""
batches from the worker processes of torch's DataLoader, for loops that are built around one.
"""
import torch

from nanoarc.data import ArcLoader, Batch

class ArcStream(torch.utils.data.IterableDataset):
    """
    an ArcLoader for torch's DataLoader(ArcStream(ds), batch_size=None, num_workers=n) and torchdata's
    StatefulDataLoader, which saves and resumes it. worker w of n makes the batches w, w + n, ...: in all the same ones
    in the same order. each new iterator begins anew, or where load_state_dict said; a resumed run wants as many workers
    as before.
    """

    def __init__(self, dataset, rank=0, world=1):
        self.args = dataset, rank, world
        self.start = {} # where the next iterator begins, {} = at the beginning
        self.place = {} # where this one is

    def __iter__(self):
        self.start, self.place = {}, self.start # at once, a generator would wait for its first batch
        return self.batches(dict(self.place))

    def batches(self, start):
        info = torch.utils.data.get_worker_info()
        worker, n = (info.id, info.num_workers) if info else (0, 1)
        loader = ArcLoader(*self.args, prefetch=False)
        saved = start.pop('workers', 1)
        if start:
            if saved not in (1, n):
                raise ValueError(f"resume refused: workers differs (saved {saved}, now {n})")
            loader.load_state_dict(start)
        # batches of other workers before its first one: of 3 workers, number 1 makes the batches 1, 4, 7, ...
        # if it goes on after a batch of its own, n - 1 of theirs come before its next
        skip = n - 1 if saved > 1 else worker
        while True:
            for _ in range(skip):
                loader.window, loader.batch = loader.after(loader.window, loader.batch)
            skip = n - 1
            batch = loader.next_batch()
            batch = Batch(*(x if x is None else x.clone() for x in batch)) # the next one comes before this one is used
            self.place = {**loader.state_dict(), 'workers': n}
            yield batch

    def state_dict(self):
        """ of this worker, {} before its first batch """
        return self.start or self.place

    def load_state_dict(self, state):
        """
        where the next iterator begins: a state of this or of an ArcLoader. raises ValueError there, if it is a place in
        another stream
        """
        self.start = state or {}
