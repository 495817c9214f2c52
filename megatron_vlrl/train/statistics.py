"""The tables of a step and its updates -> what the step reports, every mean with its denominator.

Names are `family/task`; a family without a task is over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_vlrl.algorithms.decided import deciding_component
from megatron_vlrl.backends.protocol import UpdateResult
from megatron_vlrl.config.schema import RewardConfig
from megatron_vlrl.train.quantiles import ratio_quantile
from megatron_vlrl.types import AdvantageResult, Mean, RewardTable

Means = dict[str, Mean]
_PERCENTILES = (5, 50, 95)  # of advantages
_SHARES = {"p01": 0.01, "p99": 0.99}  # of ratios
# What a token loss sums that is not a mean over the tokens that count.
_NO_TOKEN_MEAN = ("loss", "tokens", "fresh", "mismatch_kl", "ratios", "mismatches")


def step_means(
    drawn: Sequence[RewardTable],
    table: RewardTable,
    advantages: AdvantageResult,
    updates: Sequence[UpdateResult],
    reward: RewardConfig,
) -> Means:
    """Every mean of a step. drawn: the rewards of all that was written for it; table: of the batch that it trained."""
    bands = reward.length_bands if reward.length_unit == "token" else {}
    return (
        reward_means(drawn)
        | envelope_means(drawn, bands)
        | advantage_means(table, advantages)
        | update_means(updates, table.task_names)
    )


def step_scalars(table: RewardTable, advantages: AdvantageResult, updates: Sequence[UpdateResult]) -> dict[str, float]:
    """What a step reports besides means: extremes, percentiles and counts, by task."""
    return advantage_scalars(table, advantages) | update_scalars(updates, table.task_names)


def why_skipped(updates: Sequence[UpdateResult]) -> str | None:
    """Why a step's updates left the weights as they were; None if none did."""
    if not updates:
        return "no group has rewards that differ"
    return "; ".join(update.skipped for update in updates if update.skipped) or None


def reward_means(tables: Sequence[RewardTable]) -> Means:
    """Rewards, their components and response lengths, by task and over all: of every rollout written for this step."""
    means: Means = {}
    for table in tables:
        for name, mean in _of_rewards(table):
            means[name] = means.get(name, _NOTHING) + mean
    return means


def _of_rewards(table: RewardTable) -> Iterator[tuple[str, Mean]]:
    yield "reward", _mean(table.total)
    yield "response_length", _mean(table.length)
    for task, rows in _by_task(table):
        yield f"reward/{task}", _mean(table.total[rows])
        yield f"response_length/{task}", _mean(table.length[rows])
        yield f"failed/{task}", _mean(np.isnan(table.total[rows]))
        for number, component in enumerate(table.component_names):
            yield f"{component}/{task}", _mean(table.components[rows, number])


def envelope_means(tables: Sequence[RewardTable], bands: Mapping[str, tuple[float, float, float, float]]) -> Means:
    """The share of each task's responses that are shorter, and longer, than the flat part of its length envelope.

    bands: task -> min, low, high, max in tokens.
    """
    means: Means = {}
    for table in tables:
        for task, rows in _by_task(table):
            if task in bands:
                length, (_, low, high, _) = table.length[rows], bands[task]
                for name, outside in (("under_envelope", length < low), ("over_envelope", length > high)):
                    means[f"{name}/{task}"] = means.get(f"{name}/{task}", _NOTHING) + _mean(outside)
    return means


def advantage_means(table: RewardTable, advantages: AdvantageResult) -> Means:
    """What the advantages of a step's batch look like, by task; `advantage_var` is their population variance.

    decided_<component>: the share of the steps between neighbouring ranks of a group that this component decided.
    """
    decided = deciding_component(table.total, table.components, table.weights, table.position)
    means: Means = {}
    for task, rows in _by_task(table):
        values = advantages.values[rows]
        means[f"uniform/{task}"] = _mean(advantages.uniform[rows])
        means[f"tied/{task}"] = _mean(advantages.tied[rows])
        means[f"advantage/{task}"] = _mean(values)
        means[f"advantage_var/{task}"] = _mean((values - values.mean()) ** 2)
        steps = decided[rows]
        for number, component in enumerate(table.component_names):
            means[f"decided_{component}/{task}"] = _mean(steps[steps >= 0] == number)
    return {name: mean for name, mean in means.items() if mean.count}


def advantage_scalars(table: RewardTable, advantages: AdvantageResult) -> dict[str, float]:
    """By task: the greatest |advantage|, percentiles, and how many rollouts the ranking really had (neither failed nor
    of a uniform group)."""
    scalars: dict[str, float] = {}
    for task, rows in _by_task(table):
        values = advantages.values[rows]
        scalars[f"advantage_max/{task}"] = float(np.abs(values).max())
        for percent, value in zip(_PERCENTILES, np.percentile(values, _PERCENTILES), strict=True):
            scalars[f"advantage_p{percent:02d}/{task}"] = float(value)
        scalars[f"effective_n/{task}"] = float((~advantages.uniform & ~advantages.dropped)[rows].sum())
    return scalars


def update_means(updates: Sequence[UpdateResult], task_names: Sequence[str]) -> Means:
    """Means over the tokens of all updates; `mismatch_kl`, of sampler to trainer, over those tokens of the first one
    that the weights at the step's start wrote."""
    if not updates:
        return {}
    total = _totals(updates)
    means: Means = {}
    for name in total.keys() - set(_NO_TOKEN_MEAN):
        means |= _by_name(name, total[name], total["tokens"], task_names)
    first = updates[0].sums
    means |= _by_name("mismatch_kl", first["mismatch_kl"], first["fresh"], task_names)
    means["loss"] = Mean(total=float(total["loss"]), count=len(updates))
    means["grad_norm"] = Mean(total=math.fsum(update.grad_norm for update in updates), count=len(updates))
    return {name: mean for name, mean in sorted(means.items()) if mean.count}


def update_scalars(updates: Sequence[UpdateResult], task_names: Sequence[str]) -> dict[str, float]:
    """Percentiles by task of pi / pi_old over all updates, and of trainer / sampler over the first one's fresh tokens,
    with the greatest difference of their log-probs."""
    if not updates:
        return {}
    ratios, mismatches = _totals(updates)["ratios"], updates[0].sums["mismatches"]
    greatest = {"mismatch_max": updates[0].maxima["drift"]} if updates[0].sums["fresh"].any() else {}
    return greatest | {
        f"{family}_{name}/{task}": ratio_quantile(counts[number], share)
        for family, counts in (("ratio", ratios), ("mismatch_ratio", mismatches))
        for number, task in enumerate(task_names)
        if counts[number].any()
        for name, share in _SHARES.items()
    }


_NOTHING = Mean(total=0.0, count=0.0)


def _totals(updates: Sequence[UpdateResult]) -> dict[str, NDArray[np.float64]]:
    return {name: np.sum([update.sums[name] for update in updates], axis=0) for name in updates[0].sums}


def _by_name(
    name: str, totals: NDArray[np.float64], counts: NDArray[np.float64], task_names: Sequence[str]
) -> Iterator[tuple[str, Mean]]:
    """`name` over all tasks, and `name/task` for each."""
    yield name, Mean(total=math.fsum(totals), count=math.fsum(counts))
    for task, total, count in zip(task_names, totals.tolist(), counts.tolist(), strict=True):
        yield f"{name}/{task}", Mean(total=total, count=count)


def _by_task(table: RewardTable) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    for number, task in enumerate(table.task_names):
        rows = table.task == number
        if rows.any():
            yield task, rows


def _mean(values: NDArray[np.generic]) -> Mean:
    """Of the values that are not NaN."""
    numbers = values.astype(np.float64)
    kept = numbers[~np.isnan(numbers)]
    return Mean(total=math.fsum(kept), count=len(kept))
