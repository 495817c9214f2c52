"""Log-probs of trainer and sampler for the same weights in, what each token's loss is multiplied with out.

Engine and trainer compute the same policy with other kernels, so that the samples are slightly off policy. Every kind
is `(old_log_probs, rollout_log_probs, sequences, *, cap) -> (weights, marks)`: old_log_probs: Float[Tensor, "R"], the
trainer's at the step's start. rollout_log_probs: Float[Tensor, "R"], those drawn with. sequences: Int[Tensor, "R"], as
for the objectives. cap: 1 or more. weights: Float[Tensor, "R"], detached. marks: Float[Tensor, "R"] each, to be
averaged: `mismatch_kl` estimates KL(sampler || trainer). ValueError for columns of unequal shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_vlrl.algorithms.losses import MAX_LOG_RATIO, require_same_shape, sequence_sums

Importance = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def none(
    old_log_probs: Tensor, rollout_log_probs: Tensor, sequences: Tensor, *, cap: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """1 for every token; for old_log_probs that are the sampler's."""
    require_same_shape(old_log_probs, rollout_log_probs, sequences)
    return torch.ones_like(old_log_probs), {}


def token_tis(
    old_log_probs: Tensor, rollout_log_probs: Tensor, sequences: Tensor, *, cap: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """min(trainer / sampler, cap) by token: truncated importance sampling (F. Yao et al., "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training", 2025).

    marks: `importance`, the weight; `importance_capped`, 1 where the cap holds; `mismatch_kl`.
    """
    ratio, mismatch = _ratios(old_log_probs, rollout_log_probs, sequences)
    weights = ratio.clamp(max=cap)
    capped = (ratio > cap).to(ratio.dtype)
    return weights, {"importance": weights, "importance_capped": capped, "mismatch_kl": mismatch}


def sequence_mask(
    old_log_probs: Tensor, rollout_log_probs: Tensor, sequences: Tensor, *, cap: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """1 for the tokens of a response whose trainer / sampler, of the whole response, is in [1 / cap, cap]; else 0.

    marks: `importance`, the weight, whose mean is the share of tokens kept; `mismatch_kl`.
    """
    ratio, mismatch = _ratios(old_log_probs, rollout_log_probs, sequences)
    total = sequence_sums((old_log_probs - rollout_log_probs).detach(), sequences)
    weights = (total.abs() <= math.log(cap)).to(ratio.dtype)
    return weights, {"importance": weights, "mismatch_kl": mismatch}


IMPORTANCE: dict[str, Importance] = {"none": none, "token_tis": token_tis, "sequence_mask": sequence_mask}


def _ratios(old_log_probs: Tensor, rollout_log_probs: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """trainer / sampler, and x - 1 - log x of it."""
    require_same_shape(old_log_probs, rollout_log_probs, sequences)
    log_ratio = (old_log_probs - rollout_log_probs).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp(), log_ratio.exp() - 1.0 - log_ratio
