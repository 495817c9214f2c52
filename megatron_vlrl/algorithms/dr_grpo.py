"""Dr. GRPO (arXiv 2503.20783): each reward less its group's mean. Its loss divides by a constant, not by |y|."""

from __future__ import annotations

from megatron_vlrl.algorithms.columns import RewardColumns
from megatron_vlrl.algorithms.groups import group_values, reward_groups
from megatron_vlrl.types import AdvantageResult


def dr_grpo(columns: RewardColumns, *, tie_tol: float = 1e-9, invalid_reward: str = "drop") -> AdvantageResult:
    """R - mean within each group; 0 where all its rewards are equal, as in a group of one.

    Bit-equal for every order of the rows. The constant of the loss is `algorithm.loss.aggregation: constant`.
    """
    groups, result = reward_groups(columns, invalid_reward, tie_tol)
    return group_values(groups, result, groups.centered())
