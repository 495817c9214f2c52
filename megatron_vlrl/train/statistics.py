"""The table of a step and its updates -> what the step reports, every mean with its denominator."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_vlrl.backends.protocol import UpdateResult
from megatron_vlrl.types import AdvantageResult, Mean, RewardTable


def table_means(table: RewardTable, advantages: AdvantageResult) -> dict[str, Mean]:
    """Rewards, components, lengths and flags, over all rollouts and by task."""
    means: dict[str, Mean] = {}
    for task, rows in _by_task(table):
        means |= {f"reward/{task}": _mean(table.total[rows]), f"length/{task}": _mean(table.length[rows])}
        for number, component in enumerate(table.component_names):
            means[f"{component}/{task}"] = _mean(table.components[rows, number])
        means[f"uniform/{task}"] = _mean(advantages.uniform[rows])
        means[f"tied/{task}"] = _mean(advantages.tied[rows])
        means[f"failed/{task}"] = _mean(np.isnan(table.total[rows]))
    return means | {"reward": _mean(table.total), "length": _mean(table.length)}


def update_means(updates: Sequence[UpdateResult], task_names: Sequence[str]) -> dict[str, Mean]:
    """Means over the tokens of all updates; mismatch_kl over the first's, whose weights wrote the rollouts."""
    total: dict[str, float] = {}
    for update in updates:
        for name, value in update.sums.items():
            total[name] = total.get(name, 0.0) + value
    means = {f"entropy/{t}": Mean(total=total[f"entropy/{t}"], count=total[f"tokens/{t}"]) for t in task_names}
    means["entropy"] = sum(means.values(), Mean(total=0.0, count=0.0))
    per_token = set(total) - {"loss", "tokens"} - {f"{kind}/{t}" for kind in ("entropy", "tokens") for t in task_names}
    means |= {name: Mean(total=total[name], count=total["tokens"]) for name in sorted(per_token)}
    first = updates[0].sums
    if "policy_kl" in first:
        means["mismatch_kl"] = Mean(total=first["policy_kl"], count=first["tokens"])
    means["grad_norm"] = Mean(total=math.fsum(update.grad_norm for update in updates), count=len(updates))
    means["loss"] = Mean(total=total["loss"], count=len(updates))
    return {name: mean for name, mean in means.items() if mean.count}


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
