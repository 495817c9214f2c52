"""REINFORCE++ (arXiv 2501.03262): rewards whitened over the whole batch, all tasks together."""

from __future__ import annotations

from megatron_vlrl.algorithms.blocks import whiten
from megatron_vlrl.algorithms.columns import RewardColumns, require, require_eps, sample_weights
from megatron_vlrl.algorithms.groups import reward_groups
from megatron_vlrl.types import AdvantageResult


def reinforce_plus_plus(
    columns: RewardColumns,
    *,
    baseline: str = "none",
    eps: float = 1e-6,
    token_weighted: bool = False,
    tie_tol: float = 1e-9,
    invalid_reward: str = "drop",
) -> AdvantageResult:
    """(x - mean) / (std + eps) over the batch, where x is the reward and std has n below; bit-equal in any order.

    baseline: `group` takes each group's mean from x first (the paper's REINFORCE++-baseline, in which a uniform group
    gets 0); with `none` a uniform group keeps what it is worth in the batch. A group of one is left out of mean and std
    and gets 0. token_weighted: a rollout counts as often as it has tokens; needs `lengths`.
    """
    require("baseline", baseline, ("none", "group"))
    require_eps(eps)
    weights = sample_weights(columns, token_weighted=token_weighted)
    groups, result = reward_groups(columns, invalid_reward, tie_tol)
    value = groups.values if baseline == "none" else groups.centered()
    counted = groups.rows(groups.sizes > 1)
    places = groups.order[counted]
    result.values[places] = whiten(value[counted], weights[places], eps)
    if baseline == "group":
        result.values[result.uniform] = 0.0
    return result
