"""GDPO (arXiv 2601.05242): each component normalised in its group, and their weighted sum whitened over the batch."""

from __future__ import annotations

import numpy as np

from megatron_vlrl.algorithms.blocks import whiten
from megatron_vlrl.algorithms.columns import RewardColumns, by_component, sample_weights, settle_invalid
from megatron_vlrl.algorithms.groups import joined
from megatron_vlrl.algorithms.grpo import grpo
from megatron_vlrl.types import AdvantageResult


def gdpo(
    columns: RewardColumns,
    *,
    eps: float = 1e-6,
    unbiased: bool = True,
    token_weighted: bool = False,
    tie_tol: float = 1e-9,
    invalid_reward: str = "drop",
) -> AdvantageResult:
    """Sum over components of weight * (r - mean) / (std + eps) of the group, then whitened; bit-equal in any order.

    Needs `components`; those of weight 0 are not looked at. A rollout without a component (NaN) is left out of that
    component's mean and std and gets 0 for it. Whitening is (x - mean) / (std + eps) over all rollouts that are not
    dropped, of all tasks, std with n below; token_weighted: each counts as often as it has tokens; needs `lengths`.
    unbiased: the group's std divides by n - 1. The total reward only says which rollouts are invalid.
    uniform (A = 0): no component that the rollout has differs in its group. tied: it shares its value in all that do.
    """
    counts = sample_weights(columns, token_weighted=token_weighted)
    columns, dropped = settle_invalid(columns, invalid_reward)
    count, kept = len(dropped), ~dropped
    parts, score = [], np.zeros(count)
    for part, weight in by_component(columns, dropped):
        parts.append(grpo(part, eps=eps, unbiased=unbiased, tie_tol=tie_tol))
        score += weight * parts[-1].values
    result = joined(parts, np.zeros(count), dropped)
    result.values[kept] = whiten(score[kept], counts[kept], eps)
    result.values[result.uniform] = 0.0
    return result
