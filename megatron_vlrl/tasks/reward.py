"""A group of rollouts in, one reward with its named parts for each out. A verifier that fails is never a 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

from megatron_vlrl.config.schema import RewardConfig
from megatron_vlrl.errors import DataError
from megatron_vlrl.tasks import resolve
from megatron_vlrl.tasks.answer import Answer, parse_answer
from megatron_vlrl.tasks.length import length_reward
from megatron_vlrl.tasks.task import Task
from megatron_vlrl.types import FailureKind, RewardBreakdown, RewardFailure, Rollout, RolloutGroup, Sample

Result = TypeVar("Result")


def reward_group(group: RolloutGroup, config: RewardConfig) -> tuple[RewardBreakdown, ...]:
    """The reward of each rollout of `group`, in order.

    total = (1 - w_format - w_length) * accuracy + w_format * format + w_length * length. Accuracy needs the
    format: a response that `parse_answer` cannot read has no answer, so both are 0. The length component is there
    when it has a weight and the task a band; without one its weight stays with accuracy.
    In the total, components named in `quantize` are rounded to multiples of their step; reported is what they were.
    A verifier that raises, gives no number in [0, 1], or has no valid gold gives a failure with total NaN.
    """
    sample = group.prompt.sample
    task = resolve(sample.task)
    weights = _weights(config, sample.task)
    failure = _guard(task, sample, lambda: task.check_gold(sample.answer))
    return tuple(_reward(rollout, sample, task, weights, config, failure) for rollout in group.rollouts)


def _weights(config: RewardConfig, task: str) -> dict[str, float]:
    length = config.length_weight if task in config.length_bands else 0.0
    weights = {"accuracy": 1.0 - config.format_weight - length, "format": config.format_weight}
    return {**weights, "length": length} if length else weights


def _reward(
    rollout: Rollout,
    sample: Sample,
    task: Task,
    weights: Mapping[str, float],
    config: RewardConfig,
    failure: RewardFailure | None,
) -> RewardBreakdown:
    answer = parse_answer(rollout.text)
    known = {"format": float(answer is not None)}
    verdict = _guard(task, sample, lambda: _accuracy(task, answer, sample)) if failure is None else failure
    if isinstance(verdict, RewardFailure):
        return RewardBreakdown(components=known, weights=weights, total=math.nan, failure=verdict)
    components = {"accuracy": verdict, **known}
    if "length" in weights:
        size = len(rollout.token_ids) if config.length_unit == "token" else len(rollout.text)
        band = config.length_bands[sample.task]
        components["length"] = length_reward(
            size, band, accuracy=verdict, only_if_correct=config.length_only_if_correct
        )
    counted = {name: _rounded(value, config.quantize.get(name, 0.0)) for name, value in components.items()}
    total = sum(weight * counted[name] for name, weight in weights.items())
    return RewardBreakdown(components=components, weights=weights, total=total)


def _rounded(value: float, step: float) -> float:
    return round(value / step) * step if step else value


def _accuracy(task: Task, answer: Answer | None, sample: Sample) -> float:
    if answer is None:
        return 0.0
    accuracy = float(task.accuracy(answer.text, sample.answer, sample.meta))
    if not 0.0 <= accuracy <= 1.0:
        raise ValueError(f"accuracy {accuracy} is not in [0, 1]")
    return accuracy


def _guard(task: Task, sample: Sample, call: Callable[[], Result]) -> Result | RewardFailure:
    """What `call` returns, or why it could not: the border behind which a user's verifier may raise anything."""
    try:
        return call()
    except DataError as error:
        kind: FailureKind = "invalid_gold"
        reason = str(error)
    except Exception as error:  # noqa: BLE001 - one verifier's fault must not end the run; it is counted and named
        kind = "error"
        reason = f"{type(error).__name__}: {error}"
    return RewardFailure(kind=kind, message=f"task {task.name!r}, sample {sample.key!r}: {reason}")
