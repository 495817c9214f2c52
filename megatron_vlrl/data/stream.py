"""Shards -> this rank's samples, in the global order, resumable at any position.

In: a folder or `s3://` prefix with manifest and index, seed, mixture weights, rank and world (of the data-parallel
group). Out: Samples.
All ranks hold the same cursor; position p belongs to rank p % world, so what all ranks together read does not
depend on how many they are, and a run may go on with another number.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlrl.data.manifest import load, load_index
from megatron_vlrl.data.objects import open_store
from megatron_vlrl.data.order import GlobalOrder, mixture_rates
from megatron_vlrl.data.shard import parse_sample
from megatron_vlrl.errors import DataError, SampleError
from megatron_vlrl.types import Sample


class ShardReader:
    """The samples of a folder or `s3://` prefix by number, 0 to len - 1, in the order they were prepared."""

    def __init__(self, where: str | Path) -> None:
        self._store = open_store(where)
        self.manifest, self._infos = load(self._store)
        self.index = load_index(self._store, self.manifest)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, number: int, position: int) -> Sample:
        """Read sample `number` and mark it with `position`: one range of bytes of its shard.

        Raises SampleError if it is damaged, DataError if its shard cannot be read or is not what it was at the start.
        """
        shard = self.manifest.shards[int(self.index.shard[number])].name
        offset, size = int(self.index.offset[number]), int(self.index.size[number])
        block = self._store.read(shard, offset, size, self._infos[shard])
        key = self.index.key(number)
        try:
            return parse_sample(block, key, position)
        except DataError as error:
            raise SampleError(key, f"{shard} at byte {offset}: {error}") from error


class SampleStream:
    """An endless stream over the mixture; `position` of a sample is its place in the global order."""

    def __init__(self, where: str | Path, *, seed: int, weights: Mapping[str, float], rank: int, world: int) -> None:
        if not 0 <= rank < world:
            raise DataError(f"rank {rank} is not in 0..{world - 1}")
        self._reader = ShardReader(where)
        tasks = list(self._reader.manifest.tasks)
        rates = mixture_rates(tasks, weights)
        numbers = self._reader.index.task
        members = {task: np.flatnonzero(numbers == i) for i, task in enumerate(tasks) if task in rates}
        self._order = GlobalOrder(members, rates, seed)
        self._identity = {"index": self._reader.manifest.fingerprint, "seed": seed, "weights": rates}
        self._rank, self._world = rank, world
        self._cursor = 0

    @property
    def tasks(self) -> tuple[str, ...]:
        """Every task of the shards, drawn or not, the same on every rank."""
        return tuple(self._reader.manifest.tasks)

    def next(self, count: int) -> list[Sample | SampleError]:
        """Move the global cursor by `count` positions and return those of this rank, in order.

        A sample that cannot be read is returned as its SampleError. Raises DataError where a shard is gone.
        """
        start, self._cursor = self._cursor, self._cursor + count
        numbers = self._order.samples(start, count)
        return [
            self._read(number, position)
            for position, number in enumerate(numbers, start)
            if position % self._world == self._rank
        ]

    def at(self, position: int) -> Sample:
        """The sample at a position of the global order; the cursor stays. Raises SampleError if it is damaged."""
        return self._reader.read(self._order.samples(position, 1)[0], position)

    def state(self) -> dict[str, Any]:
        """JSON-like, the same on every rank: the cursor and what must not change while it means anything."""
        return {"cursor": self._cursor, **self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Raises DataError saying what changed: the shards, the seed or the mixture weights."""
        missing = [name for name in ("cursor", *self._identity) if name not in state]
        if missing:
            raise DataError(f"this is no state of a data stream: it has no {missing[0]!r}")
        for name, now in self._identity.items():
            if state[name] != now:
                what = {"index": "the shards", "seed": "run.seed", "weights": "data.weights"}[name]
                raise DataError(
                    f"cannot resume the data: {what} changed from {state[name]} to {now}, so the order is another one; "
                    "set it back, or start a new run from the exported model"
                )
        self._cursor = int(state["cursor"])

    def _read(self, number: int, position: int) -> Sample | SampleError:
        try:
            return self._reader.read(number, position)
        except SampleError as error:
            return error
