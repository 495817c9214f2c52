"""How many bytes autograd holds: every storage once, from when it is first saved to when its last user has gone."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


class LiveBytes(TorchDispatchMode):
    """Bytes of every tensor made inside the block, temporary or saved, while it exists: `now` and `peak`.

    Also of what a checkpoint keeps without autograd's hooks. `known`: tensors that are there before.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it returns."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is None or storage.data_ptr() in self.seen:
                continue
            self.seen.add(storage.data_ptr())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage.data_ptr(), storage.nbytes())
        return out

    def _forget(self, place: int, nbytes: int) -> None:
        self.seen.discard(place)
        self.now -= nbytes
