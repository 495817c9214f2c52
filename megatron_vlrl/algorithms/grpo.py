"""GRPO: each reward less its group's mean, divided by the group's standard deviation."""

from __future__ import annotations

import math

import numpy as np

from megatron_vlrl.algorithms.blocks import (
    block_sizes,
    block_starts,
    block_sums,
    single_tie,
    tie_starts,
    tied_rows,
)
from megatron_vlrl.algorithms.columns import RewardColumns, blank_result, require_number, settle_invalid
from megatron_vlrl.errors import ConfigError
from megatron_vlrl.types import AdvantageResult


def grpo(
    columns: RewardColumns,
    *,
    eps: float = 1e-6,
    unbiased: bool = True,
    tie_tol: float = 1e-9,
    invalid_reward: str = "drop",
) -> AdvantageResult:
    """(R - mean) / (std + eps) within each group; 0 where all its rewards are equal, as in a group of one.

    unbiased: the standard deviation divides by n - 1, not by n. Bit-equal for every order of the rows.
    """
    _check_options(eps, unbiased, tie_tol)
    columns, dropped = settle_invalid(columns, invalid_reward)
    order = np.lexsort((columns.rewards, columns.groups, columns.tasks))
    order = order[~dropped[order]] if dropped.any() else order

    value = columns.rewards[order]
    starts = block_starts(columns.tasks[order], columns.groups[order])
    sizes = block_sizes(starts, len(order))
    centered = value - np.repeat(block_sums(value, starts) / sizes, sizes)
    freedom = np.maximum(sizes - 1, 1) if unbiased else sizes
    spread = np.sqrt(block_sums(centered**2, starts) / freedom)
    ties = tie_starts(value, starts, tie_tol)
    uniform = np.repeat(single_tie(ties, starts), sizes)

    result = blank_result(dropped)
    result.uniform[order] = uniform
    result.tied[order] = tied_rows(ties, len(order)) & ~uniform
    result.values[order] = np.where(uniform, 0.0, centered / (np.repeat(spread, sizes) + eps))
    return result


def _check_options(eps: float, unbiased: bool, tie_tol: float) -> None:
    require_number("eps", eps, lambda x: 0 < x < math.inf, "a finite number above 0")
    require_number("tie_tol", tie_tol, lambda x: 0 <= x < math.inf, "a finite number, 0 or more")
    if not isinstance(unbiased, bool):
        raise ConfigError(f"advantage option unbiased: {unbiased!r} is not true or false")
