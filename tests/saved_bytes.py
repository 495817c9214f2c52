"""How many bytes autograd holds: every storage once, from when it is first saved to when its last user has gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class SavedBytes:
    """`now` and `peak`, in bytes. `known`: storages that live anyway, such as weights."""

    known: set[int]
    now: int = 0
    peak: int = 0
    users: Counter[int] = field(default_factory=Counter)

    def change(self, tensor: Tensor, by: int) -> None:
        """One user of the tensor's storage more, or one less."""
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place in self.known:
            return
        before = self.users[place]
        self.users[place] += by
        if (before == 0) != (self.users[place] == 0):
            self.now += by * storage.nbytes()
        self.peak = max(self.peak, self.now)


class _Saved:
    def __init__(self, tensor: Tensor, account: SavedBytes) -> None:
        self.tensor, self.account = tensor, account
        account.change(tensor, 1)

    def __del__(self) -> None:
        self.account.change(self.tensor, -1)


@contextmanager
def saved_bytes(weights: Iterable[Tensor]) -> Iterator[SavedBytes]:
    """Count inside the block; what is recomputed in a backward pass counts while it is there."""
    account = SavedBytes(known={weight.untyped_storage().data_ptr() for weight in weights})
    with torch.autograd.graph.saved_tensors_hooks(lambda t: _Saved(t, account), lambda saved: saved.tensor):
        yield account
