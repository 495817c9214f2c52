"""The loss of a microbatch: objective, divergence from the reference and entropy shaping, added up over its tokens.

Every term is linear in weights that carry the global denominators, so losses of microbatches and shards add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vlrl.algorithms.importance import IMPORTANCE
from megatron_vlrl.algorithms.kl import ESTIMATORS
from megatron_vlrl.algorithms.losses import LOSSES
from megatron_vlrl.backends.protocol import TokenReport
from megatron_vlrl.config.names import resolve_name
from megatron_vlrl.config.schema import AlgorithmConfig
from megatron_vlrl.packing import Microbatch, Targets
from megatron_vlrl.train.quantiles import log_ratio_counts


def token_loss(
    batch: Microbatch, log_probs: Tensor, entropies: Tensor, *, algorithm: AlgorithmConfig, tasks: int
) -> tuple[Tensor, TokenReport]:
    """(loss, what it measured) of a microbatch with targets; log_probs, entropies: Float[Tensor, "R"] with gradient.

    Reported are sums by task, float64[tasks], over the tokens that count; and `drift`, the greatest difference from
    the sampler's log-probs among tokens that these weights wrote.
    """
    targets, config = batch.targets, algorithm.loss
    assert targets is not None
    now = log_probs.detach()
    # Without old log-probs these weights are the old ones: nothing was updated since the step began.
    old = now if targets.old_log_probs is None else targets.old_log_probs
    sequences = _sequences(batch, log_probs.device)
    objective = resolve_name(config.kind, LOSSES, "algorithm.loss.kind")
    losses, marks = objective(log_probs, old, targets.advantages, sequences, **config.options)
    importance, more = IMPORTANCE[config.importance](
        old, targets.rollout_log_probs, sequences, cap=config.importance_cap
    )
    loss = (targets.weights * importance * losses).sum()
    marks = marks | more
    if targets.reference_log_probs is not None:
        divergence = ESTIMATORS[algorithm.kl.estimator](log_probs, targets.reference_log_probs)
        loss = loss + (targets.kl_weights * divergence).sum()
        marks["reference_kl"] = ESTIMATORS["k3"](now, targets.reference_log_probs)
    if algorithm.entropy.coefficient:
        loss = loss + (targets.entropy_weights * entropy_surrogate(log_probs, entropies, algorithm)).sum()
        marks["entropy_side"] = targets.entropy_weights.sign()  # of the task's band: +1 above, -1 below
    return loss, _report(targets, marks, now, entropies.detach(), old, tasks)


def entropy_surrogate(log_probs: Tensor, entropies: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """What stands for each token's entropy in the loss, Float[Tensor, "R"]; its gradient is that of the estimator.

    full: the entropy over the vocabulary. nll: -log pi of the sampled token (OpenVLThinkerV2, eq. 10), which on policy
    has no expected gradient. score: the entropy's true gradient from samples, -(log pi + H) * grad log pi.
    """
    match algorithm.entropy.estimator:
        case "full":
            return entropies
        case "nll":
            return -log_probs
        case "score":
            return -(log_probs + entropies).detach() * log_probs


def measured_entropy(log_probs: Tensor, entropies: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """What is held against the bands, Float[Tensor, "R"]: -log pi for `nll`, else the entropy over the vocabulary."""
    return -log_probs if algorithm.entropy.estimator == "nll" else entropies


def _report(
    targets: Targets, marks: dict[str, Tensor], now: Tensor, entropies: Tensor, old: Tensor, tasks: int
) -> TokenReport:
    counted, fresh = targets.counted, targets.fresh
    mismatch = now - targets.rollout_log_probs
    columns = {name: mark * counted for name, mark in marks.items()} | {
        "entropy": entropies * counted,
        "tokens": counted,
        "mismatch_kl": ESTIMATORS["k3"](targets.rollout_log_probs, now) * fresh,
        "fresh": fresh,
    }
    table = torch.stack([column.double() for column in columns.values()])
    by_task = torch.zeros(len(columns), tasks, dtype=torch.float64, device=table.device)
    by_task.index_add_(1, targets.task, table)
    sums = dict(zip(columns, by_task, strict=True))
    compared = counted if "policy_kl" in marks else torch.zeros_like(counted)  # nll looks at no ratio
    sums["ratios"] = log_ratio_counts(now - old, targets.task, compared, tasks)
    sums["mismatches"] = log_ratio_counts(mismatch, targets.task, fresh, tasks)
    return TokenReport(sums=sums, maxima={"drift": (mismatch * fresh).abs().max()})


def _sequences(batch: Microbatch, device: torch.device) -> Tensor:
    """Which response of the row each of its R response tokens is of, int64[R]."""
    lengths = torch.tensor(batch.lengths, device=device)
    return torch.arange(len(lengths), device=device).repeat_interleave(lengths)
