"""What every kind that compares within a group has: the sorted groups, what an equal group gets, and the flags."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_vlrl.algorithms.blocks import Blocks, from_zero, kept_blocks, pair_ids, shared
from megatron_vlrl.algorithms.columns import Bools, Floats, Ints, RewardColumns, require_tolerance, settle_invalid
from megatron_vlrl.types import AdvantageResult


def block_ids(columns: RewardColumns) -> tuple[Ints, Ints]:
    """(one id for each group, ascending if the groups' ids are; one for each task), int64[N], 0 or more."""
    tasks = from_zero(columns.tasks)
    return pair_ids(from_zero(columns.groups), tasks), tasks


def reward_groups(columns: RewardColumns, invalid_reward: str, tie_tol: float) -> tuple[Blocks, AdvantageResult]:
    """(groups of the rows that count, the result so far: all flags set, all values 0).

    uniform: all rewards of the group are equal within `tie_tol`, as in a group of one. tied: shares its reward with
    another of its group, where that is not uniform. Raises ConfigError for an option's value, and what
    `settle_invalid` raises.
    """
    require_tolerance(tie_tol)
    columns, dropped = settle_invalid(columns, invalid_reward)
    groups = kept_blocks(columns.rewards, block_ids(columns)[0], ~dropped)
    result = blank_result(dropped)
    uniform = groups.rows(groups.uniform(tie_tol))
    result.uniform[groups.order] = uniform
    result.tied[groups.order] = shared(groups.fresh(tie_tol)) & ~uniform
    return groups, result


def group_values(groups: Blocks, result: AdvantageResult, values: Floats) -> AdvantageResult:
    """The result with one of `values` for each row of the groups; exactly 0 where the group is uniform."""
    result.values[groups.order] = np.where(result.uniform[groups.order], 0.0, values)
    return result


def blank_result(dropped: Bools) -> AdvantageResult:
    """0 for each rollout and no other flag, to be filled in."""
    count = len(dropped)
    return AdvantageResult(
        values=np.zeros(count),
        uniform=np.zeros(count, dtype=np.bool_),
        tied=np.zeros(count, dtype=np.bool_),
        dropped=dropped,
    )


def joined(parts: Sequence[AdvantageResult], values: Floats, dropped: Bools) -> AdvantageResult:
    """`values` with the flags of the parts, one for each component.

    uniform: no component that the rollout has differs within its group. tied: no component tells it from all others,
    that is, it shares its rank in every component that differs within its group.
    """
    silent = [part.uniform | part.dropped for part in parts]
    uniform = np.logical_and.reduce([~dropped, *silent])
    tied = np.logical_and.reduce([~dropped, ~uniform, *(part.tied | s for part, s in zip(parts, silent, strict=True))])
    return AdvantageResult(values=values, uniform=uniform, tied=tied, dropped=dropped)
