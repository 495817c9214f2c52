"""Sums, ties and ranks within blocks of sorted rows, without a Python loop over the blocks.

Rows are sorted by their ids and then by value, so that a block (the rows with the same ids) lies together and in
ascending order: whatever order the rows arrived in, the same numbers are added in the same order. `starts` is the
place of each block's first row, int64[B], the first of them 0.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri

from megatron_vlrl.algorithms.columns import Bools, Floats, Ints


def block_starts(*ids: Ints) -> Ints:
    """Where a row's ids differ from those of the row before; empty for no rows."""
    fresh = np.ones(len(ids[0]), dtype=np.bool_)
    fresh[1:] = False
    for column in ids:
        fresh[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(fresh)


def block_sizes(starts: Ints, rows: int) -> Ints:
    """Rows of each block, int64[B]."""
    return np.diff(starts, append=rows)


def block_sums(values: Floats, starts: Ints) -> Floats:
    """Sum of each block, float64[B]."""
    return np.add.reduceat(values, starts) if len(starts) else np.zeros(0)


def tie_starts(values: Floats, starts: Ints, tolerance: float) -> Ints:
    """Where each set of equal values of a block begins.

    Values are rounded to multiples of the tolerance, and neighbours at most one multiple apart are equal: so the
    noise of a float sum cannot split a tie, on whichever side of a rounding boundary it falls.
    """
    fresh = np.empty(len(values), dtype=np.bool_)
    if tolerance > 0:
        fresh[1:] = np.diff(np.rint(values / tolerance)) > 1
    else:
        fresh[1:] = values[1:] > values[:-1]
    fresh[starts] = True
    return np.flatnonzero(fresh)


def tied_rows(ties: Ints, rows: int) -> Bools:
    """Whether a row shares its value with another of its block, bool[rows]."""
    counts = block_sizes(ties, rows)
    return np.repeat(counts > 1, counts)


def single_tie(ties: Ints, starts: Ints) -> Bools:
    """Whether all values of a block are equal, bool[B]."""
    first = np.searchsorted(ties, starts)
    return np.asarray(np.diff(first, append=len(ties)) == 1)


def gaussian_ranks(starts: Ints, ties: Ints, rows: int) -> Floats:
    """Each row's normal score within its block: the inverse normal CDF of (rank - 1/2) / n, averaged over its tie.

    float64[rows]; exactly 0 where a whole block is one tie (OpenVLThinkerV2, eqs. 6 to 8).
    """
    if not rows:
        return np.zeros(0)
    sizes = block_sizes(starts, rows)
    size = np.repeat(sizes, sizes)
    # Twice the distance from the block's middle. Scores of the lower half, mirrored: exactly antisymmetric.
    offset = 2 * (np.arange(rows) - np.repeat(starts, sizes)) + 1 - size
    score = np.copysign(ndtri((size - np.abs(offset)) / (2.0 * size)), offset)
    counts = block_sizes(ties, rows)
    mean = block_sums(score, ties) / counts
    mean[counts == size[ties]] = 0.0
    return np.repeat(mean, counts)
