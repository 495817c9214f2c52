"""RLOO (arXiv 2402.14740): each reward less the mean of the others of its group."""

from __future__ import annotations

import numpy as np

from megatron_vlrl.algorithms.columns import RewardColumns
from megatron_vlrl.algorithms.groups import group_values, reward_groups
from megatron_vlrl.types import AdvantageResult


def rloo(columns: RewardColumns, *, tie_tol: float = 1e-9, invalid_reward: str = "drop") -> AdvantageResult:
    """R - mean of the other n - 1 rewards, which is (R - mean) n / (n - 1), within each group; bit-equal in any order.

    0 where all rewards of the group are equal, as in a group of one, which has no others.
    """
    groups, result = reward_groups(columns, invalid_reward, tie_tol)
    others = groups.sizes / np.maximum(groups.sizes - 1, 1)
    return group_values(groups, result, groups.centered() * groups.rows(others))
