"""Sums, ties and ranks within blocks of sorted rows, without a Python loop over the blocks.

A block is the rows with one id: a group, or a task. Rows are sorted by id and then by value: whatever order they
arrived in, the same numbers are added in the same order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from megatron_vlrl.algorithms.columns import Bools, Floats, Ints

COMMON_SIZES = 64  # blocks up to this size look their normal scores up


@dataclass(frozen=True, slots=True)
class Blocks:
    """n rows in B blocks. order: int64[n], their places in the table. values: float64[n], ascending within a block.

    starts, sizes: int64[B], where a block begins and how many rows it has.
    """

    order: Ints
    values: Floats
    starts: Ints
    sizes: Ints

    def rows(self, each: NDArray[Any]) -> NDArray[Any]:
        """What each block has, for each of its rows: [B] -> [n]."""
        return each.repeat(self.sizes)

    def sums(self, values: Floats) -> Floats:
        """Sum over each block: [n] -> float64[B]."""
        return _sums(values, self.starts)

    def centered(self) -> Floats:
        """The values less their block's mean, float64[n]."""
        centered: Floats = self.values - self.rows(self.sums(self.values) / self.sizes)
        return centered

    def deviations(self, *, unbiased: bool) -> Floats:
        """Standard deviation of each block, float64[B]; unbiased: squares are divided by n - 1 (at least 1), not n."""
        freedom = np.maximum(self.sizes - 1, 1) if unbiased else self.sizes
        spread: Floats = np.sqrt(self.sums(self.centered() ** 2) / freedom)
        return spread

    def uniform(self, tolerance: float) -> Bools:
        """Whether all values of a block are equal, bool[B]; so they are in a block of one."""
        least, most = self.values[self.starts], self.values[self.starts + self.sizes - 1]
        return ~_apart(_steps(least, tolerance), _steps(most, tolerance), tolerance)

    def fresh(self, tolerance: float) -> Bools:
        """Whether a row begins a tie, bool[n]: it is the first of its block, or not equal to the row before.

        Values are rounded to multiples of the tolerance, and neighbours at most one multiple apart are equal: so the
        noise of a float sum cannot split a tie, on whichever side of a rounding boundary it falls.
        """
        steps = _steps(self.values, tolerance)
        begins = np.empty(len(steps), dtype=np.bool_)
        begins[1:] = _apart(steps[:-1], steps[1:], tolerance)
        begins[self.starts] = True
        return begins


def from_zero(ids: Ints) -> Ints:
    """Ids in the same order from 0 on, none as large as 2**31."""
    if not len(ids):
        return ids
    least, most = int(ids.min()), int(ids.max())
    return ids - least if most - least < 2**31 else np.unique(ids, return_inverse=True)[1]


def pair_ids(outer: Ints, inner: Ints) -> Ints:
    """One id for each pair of ids, in the order of the pairs, int64[N]; both as `from_zero` gives them."""
    return outer * (int(inner.max(initial=0)) + 1) + inner


def ascending(values: Floats, kept: Bools) -> Ints:
    """Places of the kept values, the least first."""
    order = values.argsort()
    return order if kept.all() else order[kept[order]]


def sort_blocks(values: Floats, ids: Ints, order: Ints) -> Blocks:
    """Blocks, by ascending id, of the rows at the places `order`, in which the values ascend; ids of 0 or more."""
    top, shift = int(ids.max(initial=0)), 0
    while top >> shift:  # a radix sort: numpy sorts 16 bits in linear time, and keeps the order of equal ones
        order = order[(ids >> shift).astype(np.uint16)[order].argsort(kind="stable")]
        shift += 16
    return _split(values, ids, order)


def kept_blocks(values: Floats, ids: Ints, kept: Bools) -> Blocks:
    """Blocks, by ascending id, of the kept rows; ids of 0 or more.

    A step's table has prompt after prompt, each with as many answers: there it is enough to sort within each.
    """
    size = _run_length(ids)
    if not size:
        return sort_blocks(values, ids, ascending(values, kept))
    starts = np.arange(0, len(ids), size)
    order = (values.reshape(-1, size).argsort() + starts[:, None]).ravel()
    if not kept.all():
        return _split(values, ids, order[kept[order]])
    return Blocks(order, values[order], starts, np.full(len(starts), size))


def _run_length(ids: Ints) -> int:
    """How many rows each block has, where the table has them block after block by ascending id, all alike; else 0."""
    if not len(ids):
        return 0
    size = int((ids != ids[0]).argmax()) or len(ids)
    heads = ids[::size]
    alike = len(heads) * size == len(ids) and (heads[1:] > heads[:-1]).all() and (heads.repeat(size) == ids).all()
    return size if alike else 0


def _split(values: Floats, ids: Ints, order: Ints) -> Blocks:
    """Blocks of the rows at the places `order`, which are in the order of their ids."""
    sorted_ids = ids[order]
    first = np.empty(len(order), dtype=np.bool_)
    first[:1] = True
    first[1:] = sorted_ids[1:] != sorted_ids[:-1]
    starts = first.nonzero()[0]
    return Blocks(order, values[order], starts, _lengths(starts, len(order)))


def shared(fresh: Bools) -> Bools:
    """Whether a row shares its value with another of its block, bool[n], from where ties begin."""
    alone = fresh.copy()
    alone[:-1] &= fresh[1:]
    return ~alone


def gaussian_ranks(blocks: Blocks, fresh: Bools) -> Floats:
    """Each row's normal score within its block: the inverse normal CDF of (rank - 1/2) / n, averaged over its tie.

    float64[n]; exactly 0 where a whole block is one tie (OpenVLThinkerV2, eqs. 6 to 8).
    """
    score = _untied_scores(blocks)
    if fresh.all():
        return score
    ties = fresh.nonzero()[0]
    counts = _lengths(ties, len(fresh))
    mean = _sums(score, ties) / counts
    bounds = np.zeros(len(fresh) + 1, dtype=np.bool_)
    bounds[blocks.starts] = bounds[-1] = True
    mean[bounds[ties] & bounds[ties + counts]] = 0.0
    return mean.repeat(counts)


def _untied_scores(blocks: Blocks) -> Floats:
    """As if no two values were equal. Blocks of one size have the same scores, computed once."""
    if blocks.sizes.max(initial=0) <= COMMON_SIZES:
        table, begins = COMMON_SCORES
    else:
        table, begins = _normal_scores(np.bincount(blocks.sizes).nonzero()[0])
    places: Ints = np.arange(len(blocks.order)) - blocks.rows(blocks.starts - begins[blocks.sizes])
    return table[places]


def _normal_scores(sizes: Ints) -> tuple[Floats, Ints]:
    """(the normal scores of n untied values for one size n after the other, where those of a size begin).

    sizes: n, ascending, at least one. float64[sum of sizes], int64[largest size + 1].
    """
    begins = np.zeros(int(sizes[-1]) + 1, dtype=np.int64)
    begins[sizes] = np.cumsum(sizes) - sizes
    size = sizes.repeat(sizes)
    # Twice the distance from the block's middle. Scores of the lower half, mirrored: exactly antisymmetric.
    offset = 2 * (np.arange(len(size)) - begins[size]) + 1 - size
    scores: Floats = np.copysign(ndtri((size - np.abs(offset)) / (2.0 * size)), offset)
    return scores, begins


COMMON_SCORES = _normal_scores(np.arange(1, COMMON_SIZES + 1))


def whiten(values: Floats, weights: Floats, eps: float) -> Floats:
    """(x - mean) / (std + eps) over all n values, each counting as its weight over 0; the same bits in any order."""
    if not len(values):
        return values
    total = _any_order_sum(weights)
    centered = values - _any_order_sum(weights * values) / total
    spread = math.sqrt(_any_order_sum(weights * centered**2) / total)
    return centered / (spread + eps)


def _any_order_sum(values: Floats) -> float:
    return float(np.sort(values).sum())


def _sums(values: Floats, starts: Ints) -> Floats:
    sums: Floats = np.add.reduceat(values, starts) if len(starts) else np.zeros(0)
    return sums


def _lengths(starts: Ints, rows: int) -> Ints:
    lengths = np.empty_like(starts)
    np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
    lengths[-1:] = rows - starts[-1:]
    return lengths


def _steps(values: Floats, tolerance: float) -> Floats:
    if tolerance == 0:
        return values
    steps = values / tolerance
    return np.rint(steps, out=steps)


def _apart(low: Floats, high: Floats, tolerance: float) -> Bools:
    return np.asarray(high - low > (1.0 if tolerance > 0 else 0.0))
