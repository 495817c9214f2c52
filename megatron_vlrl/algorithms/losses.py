"""Token objectives: log-probs and advantages in, a loss and marks for each token out. A torch file of `algorithms`.

Every objective is `(log_probs, old_log_probs, advantages, sequences, *, its own options) -> (losses, marks)`, with R
response tokens in each column. `sequences` says which response of the microbatch a token is of: 0..M-1, in blocks.
The losses are unweighted and carry the gradient; the caller adds them up with weights that hold the global
denominators, so microbatches and shards add up to the whole batch. Marks are detached, to be averaged and reported.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_vlrl.config.names import resolve_name, unknown_name
from megatron_vlrl.errors import ConfigError

MAX_LOG_RATIO = 20.0  # e^20 is far outside any clip range, and finite in every float type

TokenObjective = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def ppo_clip(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    sequences: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), with r = exp(log_probs - old_log_probs).

    log_probs: Float[Tensor, "R"] with gradient. old_log_probs, advantages: Float[Tensor, "R"] without.
    sequences: Int[Tensor, "R"]. marks: `clip_fraction`, 1 where the clip takes the token's gradient away;
    `policy_kl`, r - 1 - log r. Raises ConfigError for a bad option, ValueError for unequal shapes.
    """
    _require_clips(clip_low, clip_high)
    _require_same_shape(log_probs, old_log_probs, advantages, sequences)
    log_ratio = (log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    with torch.no_grad():
        cut = clipped * advantages < ratio * advantages
        marks = {"clip_fraction": cut.to(ratio.dtype), "policy_kl": ratio - 1.0 - log_ratio}
    return -objective, marks


def nll(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, sequences: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """-log_probs, for supervised learning; old log-probs and advantages are not looked at.

    log_probs: Float[Tensor, "R"] with gradient. marks: `nll`. Raises ValueError for unequal shapes.
    """
    _require_same_shape(log_probs, old_log_probs, advantages, sequences)
    return -log_probs, {"nll": -log_probs.detach()}


LOSSES: dict[str, TokenObjective] = {"ppo_clip": ppo_clip, "nll": nll}


def check_loss_options(kind: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError for an unknown kind or option and, for the kinds of LOSSES, for a value it does not take."""
    objective = resolve_name(kind, LOSSES, "algorithm.loss.kind")
    if not callable(objective):
        raise ConfigError(f"algorithm.loss.kind: {kind!r} is a {type(objective).__name__}, not a function")
    known = [p.name for p in inspect.signature(objective).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise unknown_name(name, known, f"algorithm.loss.options of {kind}")
    if kind in LOSSES:
        none = torch.zeros(0)
        objective(none, none, none, torch.zeros(0, dtype=torch.int64), **options)


def _require_clips(low: object, high: object) -> None:
    for name, value in (("clip_low", low), ("clip_high", high)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"algorithm.loss.options.{name} is {value!r}; use a finite number over 0")


def _require_same_shape(*columns: Tensor) -> None:
    if len({column.shape for column in columns}) > 1:
        raise ValueError(f"columns of unequal shape: {', '.join(str(tuple(column.shape)) for column in columns)}")
