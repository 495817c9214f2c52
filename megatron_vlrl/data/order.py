"""The global order of training samples: position 0, 1, 2, ... -> sample, as a pure function of seed and weights.

In: how many samples each task has, weights, seed. Out: for any position its sample, without replaying what came before.
No rank, no file, no state: a run that resumes, or goes on with other ranks, asks for the same positions.

Merging tasks. Task t with integer rate a_t (its weight; A = sum of rates) puts its k-th sample at time
(2k+1) / (2 a_t), so evenly spaced; positions number all these times in ascending order, a tie going to the task
that comes first. Equal weights give a plain rotation. At time p/A task t has put ceil(a_t p/A - 1/2) samples, which
is within 1/2 of a_t p/A; over all T tasks that is within T/2 of p. So to find position i: count at p = i - T/2 - 1
in closed form, then merge the at most T + 2 positions that remain. Up to any position, a task's count is within
1/2 + T/2 * a_t/A of its exact share. Times are compared as integers, so the order has no rounding in it.

Within a task, pass number e ("epoch") over its samples is a permutation fixed by (seed, task, e).
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from fractions import Fraction
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from megatron_vlrl.errors import ConfigError


def mixture_rates(tasks: Sequence[str], weights: Mapping[str, float]) -> dict[str, int]:
    """Weights -> the smallest integers in the same proportion, in the order of `tasks`; left-out tasks are absent.

    No weights at all: every task alike. Otherwise a task without a weight, or with weight 0, is not drawn. A weight
    counts as the decimal it is written as, so 0.1 and 0.3 are exactly 1 to 3.
    Raises ConfigError for a task that is not there, a weight that is not a number >= 0, or all of them 0.
    """
    for name, weight in weights.items():
        if name not in tasks:
            near = get_close_matches(name, tasks, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"data.weights names task {name!r}, the shards hold {', '.join(sorted(tasks))}{hint}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"data.weights.{name} is {weight}; it must be a number, 0 or more")
    if not weights:
        return dict.fromkeys(tasks, 1)
    exact = {name: Fraction(str(weights[name])) for name in tasks if weights.get(name, 0) > 0}
    if not exact:
        raise ConfigError("data.weights are all 0; give one task at least a weight above 0, or leave them all out")
    whole = math.lcm(*(w.denominator for w in exact.values()))
    rates = {name: int(w * whole) for name, w in exact.items()}
    shared = math.gcd(*rates.values())
    return {name: rate // shared for name, rate in rates.items()}


def merge(rates: Sequence[int], start: int) -> Iterator[tuple[int, int]]:
    """Endless (task number, how many of this task came before) for the positions start, start + 1, ..."""
    total = sum(rates)
    point = max(0, start - (len(rates) + 1) // 2 - 1)
    # ceil(a p / A - 1/2) in integers
    counts = [-((total - 2 * rate * point) // (2 * total)) for rate in rates]
    unit = math.lcm(*rates)  # times in units of 1 / (2 unit)
    heap = [((2 * k + 1) * (unit // rate), task, k) for task, (rate, k) in enumerate(zip(rates, counts, strict=True))]
    heapq.heapify(heap)
    position = sum(counts)
    while True:
        time, task, k = heap[0]
        if position >= start:
            yield task, k
        position += 1
        heapq.heapreplace(heap, (time + 2 * (unit // rates[task]), task, k + 1))


def permutation(seed: int, task: str, epoch: int, size: int) -> NDArray[np.int64]:
    """Order in which pass `epoch` visits the `size` samples of a task; int64[size].

    Sorts raw Philox words instead of calling Generator.permutation: numpy promises the former's bits for every version.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}/{task}".encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(size)
    return np.argsort(words, kind="stable")


class GlobalOrder:
    """Positions -> sample numbers. `members`: for each drawn task, the numbers of its samples in index order."""

    def __init__(self, members: Mapping[str, NDArray[np.int64]], rates: Mapping[str, int], seed: int) -> None:
        self._tasks = list(rates)
        self._rates = list(rates.values())
        self._members = [members[task] for task in self._tasks]
        self._seed = seed
        # The pass each task is in: only saves time, a position's sample does not depend on it.
        self._pass: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def samples(self, start: int, count: int) -> list[int]:
        """Sample numbers at the positions [start, start + count)."""
        return [self._sample(task, k) for task, k in islice(merge(self._rates, start), count)]

    def _sample(self, task: int, k: int) -> int:
        members = self._members[task]
        epoch, place = divmod(k, len(members))
        if task not in self._pass or self._pass[task][0] != epoch:
            self._pass[task] = (epoch, permutation(self._seed, self._tasks[task], epoch, len(members)))
        return int(members[self._pass[task][1][place]])
