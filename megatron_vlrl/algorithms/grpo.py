"""GRPO (arXiv 2402.03300): each reward less its group's mean, divided by the group's standard deviation."""

from __future__ import annotations

from megatron_vlrl.algorithms.columns import RewardColumns, require_eps, require_flag
from megatron_vlrl.algorithms.groups import group_values, reward_groups
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
    require_eps(eps)
    require_flag("unbiased", unbiased)
    groups, result = reward_groups(columns, invalid_reward, tie_tol)
    spread = groups.deviations(unbiased=unbiased)
    return group_values(groups, result, groups.centered() / (groups.rows(spread) + eps))
