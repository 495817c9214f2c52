"""Token objectives: log-probs and advantages in, a loss and marks for each token out. With torch, unlike advantages.

Every objective is `(log_probs, old_log_probs, advantages, sequences, *, its own options) -> (losses, marks)`:
log_probs: Float[Tensor, "R"] of the R response tokens, with gradient. old_log_probs, advantages: Float[Tensor, "R"].
sequences: Int[Tensor, "R"], which response of the microbatch a token is of: 0..M-1, in blocks.
losses: Float[Tensor, "R"], unweighted, with gradient; the caller adds them up with weights that hold the global
denominators, so microbatches of whole responses add up to the batch. marks: detached, Float[Tensor, "R"] each, to be
averaged and reported. ConfigError for an option's bad value, ValueError for columns of unequal shape.

r is the token's ratio exp(log_probs - old_log_probs), A its advantage.
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
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A): PPO, arXiv 1707.06347, eq. 7.

    DAPO's clip-higher (arXiv 2503.14476) is clip_high 0.28. marks: `clip_fraction`, 1 where the clip takes the token's
    gradient away; `policy_kl`, r - 1 - log r.
    """
    _require_above(0, clip_low=clip_low, clip_high=clip_high)
    ratio, marks = _ratios(log_probs, old_log_probs, advantages, sequences)
    objective, cut = _clip(ratio, advantages, clip_low, clip_high)
    return -objective, marks | {"clip_fraction": cut}


def dual_clip(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    sequences: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_c: float = 3.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """ppo_clip, whose objective is never under clip_c A where A < 0: dual-clip PPO, arXiv 1912.09729.

    It bounds what a token can weigh whose probability rose although its advantage is negative; clip_c is over 1. marks:
    those of ppo_clip, where `clip_fraction` counts both clips, and `dual_clip_fraction`, which counts this one.
    """
    _require_above(0, clip_low=clip_low, clip_high=clip_high)
    _require_above(1, clip_c=clip_c)
    ratio, marks = _ratios(log_probs, old_log_probs, advantages, sequences)
    objective, cut = _clip(ratio, advantages, clip_low, clip_high)
    floored = (advantages < 0) & (objective.detach() < clip_c * advantages)
    marks |= {"clip_fraction": torch.maximum(cut, floored.to(cut.dtype)), "dual_clip_fraction": floored.to(cut.dtype)}
    return -torch.where(floored, clip_c * advantages, objective), marks


def gspo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    sequences: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A): GSPO, arXiv 2507.18071, eq. 5; clips of its section 5.1.

    s is the ratio of the whole response, exp(mean over its tokens of log r), eq. 7. The gradient passes through that
    mean: s A / |y| to each token of the response, eq. 10. Frameworks mostly write the paper's GSPO-token, the value of
    s with the token's own gradient; it is the same where a response's tokens have one advantage and one weight.
    marks: as ppo_clip; `clip_fraction` is the same for all tokens of a response.
    """
    _require_above(0, clip_low=clip_low, clip_high=clip_high)
    _, marks = _ratios(log_probs, old_log_probs, advantages, sequences)
    lengths = sequence_sums(torch.ones_like(old_log_probs), sequences)
    mean = sequence_sums(log_probs - old_log_probs, sequences) / lengths
    ratio = mean.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    objective, cut = _clip(ratio, advantages, clip_low, clip_high)
    return -objective, marks | {"clip_fraction": cut}


def cispo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    sequences: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-detach(clip(r, 1 - clip_low, 1 + clip_high)) A log_probs: CISPO, MiniMax-M1, arXiv 2506.13585, eq. 4 and 5.

    The clip bounds a token's gradient and never takes it away. The paper has no lower bound (clip_low 1: a ratio is
    over 0) and does not say its upper one; frameworks take ratios up to 1.2, 1.28 or 5, the default here. The value
    of the loss means nothing, its gradient does. marks: `clip_fraction`, 1 where r is clipped; `policy_kl`.
    """
    _require_above(0, clip_low=clip_low, clip_high=clip_high)
    ratio, marks = _ratios(log_probs, old_log_probs, advantages, sequences)
    ratio = ratio.detach()
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -weight * advantages * log_probs, marks | {"clip_fraction": (weight != ratio).to(ratio.dtype)}


def sapo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    sequences: Tensor,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-(4 / tau) sigmoid(tau (r - 1)) A, tau = tau_pos where A > 0, else tau_neg: SAPO, arXiv 2511.20347, eq. 5 and 6.

    A soft clip: the gate's slope 4 p (1 - p), with p the sigmoid, is 1 on policy and falls on both sides, faster for
    the larger temperature. marks: `gate`, that slope; `policy_kl`, r - 1 - log r.
    """
    _require_above(0, tau_pos=tau_pos, tau_neg=tau_neg)
    ratio, marks = _ratios(log_probs, old_log_probs, advantages, sequences)
    tau = torch.full_like(advantages, tau_neg).masked_fill(advantages > 0, tau_pos)
    share = torch.sigmoid(tau * (ratio - 1.0))
    return -4.0 / tau * share * advantages, marks | {"gate": (4.0 * share * (1.0 - share)).detach()}


def nll(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, sequences: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """-log_probs, for supervised learning; old log-probs and advantages are not looked at. marks: `nll`."""
    require_same_shape(log_probs, old_log_probs, advantages, sequences)
    return -log_probs, {"nll": -log_probs.detach()}


LOSSES: dict[str, TokenObjective] = {
    "ppo_clip": ppo_clip,
    "dual_clip": dual_clip,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "nll": nll,
}


def check_loss_options(kind: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError for what a run's first update would refuse, before the run is built.

    That is an unknown kind, an option that it does not know and, for the kinds of LOSSES, a value that it does not
    take. kind: a name in LOSSES, or a user's `package.module:function`, an objective as above.
    """
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


def sequence_sums(values: Tensor, sequences: Tensor) -> Tensor:
    """The sum over its response, for each token: Float[Tensor, "R"]. values: Float[Tensor, "R"]."""
    # There are at most as many responses as tokens: R places need no look at the device.
    return torch.zeros_like(values).index_add(0, sequences, values)[sequences]


def require_same_shape(*columns: Tensor) -> None:
    """Raise ValueError for columns of unequal shape, which torch would broadcast."""
    if len({column.shape for column in columns}) > 1:
        raise ValueError(f"columns of unequal shape: {', '.join(str(tuple(column.shape)) for column in columns)}")


def _ratios(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, sequences: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    require_same_shape(log_probs, old_log_probs, advantages, sequences)
    log_ratio = (log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    return ratio, {"policy_kl": (torch.expm1(log_ratio) - log_ratio).detach()}


def _clip(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic objective, and 1 where its clip takes the gradient away."""
    plain, clipped = ratio * advantages, ratio.clamp(1.0 - low, 1.0 + high) * advantages
    return torch.minimum(plain, clipped), (clipped < plain).to(ratio.dtype)


def _require_above(least: float, **options: object) -> None:
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not least < value < math.inf:
            raise ConfigError(f"algorithm.loss.options.{name} is {value!r}; use a finite number over {least}")
