"""The loss of an update by its written formulas: response by response, in float64, to be differentiated by autograd.

Nothing here is the trainer's: a response is a few columns, and a task's entropy is held against its band by hinges.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vlrl.config.schema import AlgorithmConfig


@dataclass(frozen=True, kw_only=True)
class Response:
    """Columns of its tokens, Float[Tensor, "R"]. advantage: None where its reward failed.

    now, entropies: the policy's, with gradient. rollout: the sampler's log-probs; start: the trainer's at the step's
    start; reference: the reference policy's.
    """

    task: str
    advantage: float | None
    now: Tensor
    entropies: Tensor
    rollout: Tensor
    start: Tensor
    reference: Tensor


@dataclass(frozen=True, kw_only=True)
class Written:
    """loss: as written, to be differentiated. value: what the update reports, where a hinge is its linear part, without
    the band's constant. sides: of its band, +1 where the task's entropy is above it, -1 below."""

    loss: Tensor
    value: float
    sides: Mapping[str, int]


def group_relative(rewards: Sequence[float]) -> list[float | None]:
    """GRPO's advantages of one group: reward less mean, over the standard deviation; None where the reward is NaN."""
    valid = [reward for reward in rewards if not math.isnan(reward)]
    if min(valid) == max(valid):
        return [None if math.isnan(reward) else 0.0 for reward in rewards]
    mean, spread = statistics.fmean(valid), statistics.stdev(valid)
    return [None if math.isnan(reward) else (reward - mean) / (spread + 1e-6) for reward in rewards]


def written_loss(algorithm: AlgorithmConfig, responses: Sequence[Response], longest: int) -> Written:
    """The objective's negative, the divergence from the reference and the hinges of the entropy, of one update.

    responses: all of its minibatch, over all ranks. longest: what the aggregation `constant` divides by.
    """
    valid = [response for response in responses if response.advantage is not None]
    importance = [importance_of(algorithm, response) for response in valid]
    aggregate = AGGREGATE[algorithm.loss.aggregation]
    loss = -aggregate(
        [weight * objective(algorithm, one) for weight, one in zip(importance, valid, strict=True)], longest
    )
    if algorithm.kl.reference != "none":
        coefficients = [algorithm.kl.by_task.get(one.task, algorithm.kl.coefficient) for one in valid]
        estimator = DIVERGENCE[algorithm.kl.estimator]
        divergences = [estimator(one.now, one.reference) for one in valid]
        loss = loss + aggregate([c * kl for c, kl in zip(coefficients, divergences, strict=True)], longest)
    value, sides = loss.detach(), dict[str, int]()
    if algorithm.entropy.coefficient:
        for task in sorted({one.task for one in responses}):
            hinge, linear, sides[task] = shaping(algorithm, [one for one in responses if one.task == task], task)
            loss, value = loss + algorithm.entropy.coefficient * hinge, value + algorithm.entropy.coefficient * linear
    return Written(loss=loss, value=float(value), sides=sides)


# ---------------------------------------------------------------------- objectives, to be made great


def objective(algorithm: AlgorithmConfig, one: Response) -> Tensor:
    """Of each token of one response."""
    kind, o, a = algorithm.loss.kind, algorithm.loss.options, one.advantage
    assert a is not None
    old = one.rollout if algorithm.loss.importance == "none" else one.start
    ratio = torch.exp(one.now - old)
    if kind == "gspo":  # eq. 7: of the whole response
        ratio = torch.exp((one.now - old).mean()).expand_as(old)
    if kind == "cispo":
        return ratio.detach().clamp(1 - o["clip_low"], 1 + o["clip_high"]) * a * one.now
    if kind == "sapo":
        tau = o["tau_pos"] if a > 0 else o["tau_neg"]
        return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * a
    clipped = torch.min(ratio * a, ratio.clamp(1 - o["clip_low"], 1 + o["clip_high"]) * a)
    if kind == "dual_clip" and a < 0:
        return clipped.clamp(min=o["clip_c"] * a)
    assert kind in ("ppo_clip", "dual_clip", "gspo")
    return clipped


def importance_of(algorithm: AlgorithmConfig, one: Response) -> Tensor:
    """A constant for each token."""
    difference, cap = (one.start - one.rollout).detach(), algorithm.loss.importance_cap
    if algorithm.loss.importance == "token_tis":
        return difference.exp().clamp(max=cap)
    if algorithm.loss.importance == "sequence_mask":
        whole = math.exp(difference.sum())
        assert min(abs(whole - cap), abs(1 / whole - cap)) > 1e-3, "too near the border to survive rounding"
        return torch.full_like(difference, float(1 / cap <= whole <= cap))
    return torch.ones_like(difference)


DIVERGENCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": lambda now, reference: now - reference,
    "k2": lambda now, reference: (now - reference) ** 2 / 2,
    "k3": lambda now, reference: (reference - now).exp() - 1 - (reference - now),
}

# Each response's tokens -> the mean that is the loss; `longest` is the greatest length of a response.
AGGREGATE: dict[str, Callable[[Sequence[Tensor], int], Tensor]] = {
    "sequence_mean": lambda parts, _: torch.stack([part.mean() for part in parts]).mean(),
    "token_mean": lambda parts, _: torch.cat(list(parts)).mean(),
    "constant": lambda parts, longest: torch.stack([part.sum() / longest for part in parts]).mean(),
}


# ---------------------------------------------------------------------- entropy


def shaping(algorithm: AlgorithmConfig, members: Sequence[Response], task: str) -> tuple[Tensor, Tensor, int]:
    """(hinges of one task, their linear part's value, the side of the band), over all of its generated tokens.

    The value of a hinge is that of the measured mean; its gradient is the estimator's.
    """
    now, entropies = (torch.cat([getattr(one, name) for one in members]) for name in ("now", "entropies"))
    measured, trained = {
        "full": (entropies, entropies),
        "nll": (-now, -now),
        "score": (entropies, -(now + entropies).detach() * now),
    }[algorithm.entropy.estimator]
    low, high = algorithm.entropy.bands[task]
    level = measured.mean().detach()
    mean = level + trained.mean() - trained.mean().detach()
    side = int(level > high) - int(level < low)
    return torch.relu(mean - high) + torch.relu(low - mean), side * trained.mean().detach(), side


def sums_of(
    algorithm: AlgorithmConfig, computed: Sequence[Response], sides: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """What an update reports by name and task, over the tokens of what it computes: the vocabulary's entropy and, where
    it depends on them, the side of the band, the divergence and the importance."""
    columns: dict[str, Callable[[Response], Tensor]] = {
        "tokens": lambda one: torch.ones_like(one.now),
        "entropy": lambda one: one.entropies.detach(),
    }
    if sides:
        columns["entropy_side"] = lambda one: torch.full_like(one.now, sides[one.task])
    if algorithm.kl.reference != "none":
        columns["reference_kl"] = lambda one: DIVERGENCE["k3"](one.now.detach(), one.reference)
    if algorithm.loss.importance != "none":
        columns["importance"] = lambda one: importance_of(algorithm, one)
    tasks = {one.task for one in computed}
    return {
        name: {task: float(sum(column(one).sum() for one in computed if one.task == task)) for task in tasks}
        for name, column in columns.items()
    }
