"""Token objectives: log-probs and advantages in, the sum of weighted losses out. The one torch file of `algorithms`.

Every loss is `(log_probs, old_log_probs, advantages, weights, *, clip_low, clip_high) -> (loss, sums)`, with R
response tokens in each argument. The weights carry the global denominators, so losses of microbatches and shards
add up to that of the whole batch. `sums` are unweighted, detached totals over the R tokens, to report.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # e^20 is far outside any clip range, and finite in every float type

TokenObjective = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def ppo_clip(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), with r = exp(log_probs - old_log_probs).

    log_probs: Float[Tensor, "R"] with gradient. old_log_probs, advantages, weights: Float[Tensor, "R"] without.
    sums: `clip_fraction` counts the tokens whose gradient the clip takes away; `policy_kl` adds r - 1 - log r.
    Raises ValueError for unequal shapes, which torch would broadcast.
    """
    _require_same_shape(log_probs, old_log_probs, advantages, weights)
    log_ratio = (log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    with torch.no_grad():
        cut = clipped * advantages < ratio * advantages
        sums = {"clip_fraction": cut.sum(dtype=ratio.dtype), "policy_kl": (ratio - 1.0 - log_ratio).sum()}
    return -(weights * objective).sum(), sums


def nll(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-log_probs, for supervised learning; old log-probs, advantages and clips are not looked at.

    log_probs: Float[Tensor, "R"] with gradient. weights: Float[Tensor, "R"]. sums: `nll`.
    """
    _require_same_shape(log_probs, weights)
    return -(weights * log_probs).sum(), {"nll": -log_probs.detach().sum()}


LOSSES: dict[str, TokenObjective] = {"ppo_clip": ppo_clip, "nll": nll}


def _require_same_shape(*columns: Tensor) -> None:
    if len({column.shape for column in columns}) > 1:
        raise ValueError(f"columns of unequal shape: {', '.join(str(tuple(column.shape)) for column in columns)}")
