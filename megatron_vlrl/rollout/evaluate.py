"""Held-out prompts in, accuracy by task with its uncertainty out; the same on every rank, for any number of ranks.

Draws come from the sampling's own seed: the run's random state is not touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_vlrl.parallel.groups import ProcessGroups
from megatron_vlrl.rollout.distribute import gather_all
from megatron_vlrl.rollout.engine import Engine
from megatron_vlrl.types import Mean, Prompt, RewardBreakdown, Rollout, RolloutGroup, Sampling

Reward = Callable[[RolloutGroup], tuple[RewardBreakdown, ...]]
EXAMPLES_PER_TASK = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """One task's result. Means are over rollouts; `prompts` counts the items, `failures` the rewards that failed.

    A failed reward enters the accuracy as 0: what could not be verified is not claimed. `format` leaves out rollouts
    whose reward has no such component. length: response tokens.
    """

    accuracy: Mean
    format: Mean
    length: Mean
    prompts: int
    failures: int

    @property
    def half_width(self) -> float:
        """Of the accuracy's 95% interval; items are the independent draws, not the rollouts of one item."""
        return wilson_half_width(self.accuracy.value, self.prompts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """tasks: by name, sorted. examples: the first groups of every task with their rewards, for reports."""

    tasks: Mapping[str, TaskScore]
    examples: tuple[tuple[RolloutGroup, tuple[RewardBreakdown, ...]], ...]

    @property
    def mean(self) -> float:
        """Accuracy averaged over the tasks, each counting alike."""
        return (
            math.fsum(score.accuracy.value for score in self.tasks.values()) / len(self.tasks)
            if self.tasks
            else math.nan
        )

    def reaches(self, mean: float, each: float) -> bool:
        """Whether the mean over the tasks is at least `mean`, and every task at least `each`; never for a mean of 0."""
        return bool(self.tasks and mean) and (
            self.mean >= mean and min(score.accuracy.value for score in self.tasks.values()) >= each
        )

    def scores(self) -> dict[str, dict[str, float]]:
        """By task: accuracy, number of items, half-width of the 95% interval."""
        return {
            name: {"accuracy": score.accuracy.value, "count": score.prompts, "half_width": score.half_width}
            for name, score in self.tasks.items()
        }

    @property
    def failures(self) -> int:
        """Rewards that failed, over all tasks."""
        return sum(score.failures for score in self.tasks.values())


def evaluate(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, reward: Reward, groups: ProcessGroups
) -> Evaluation:
    """Answer and score `prompts`, the same list on every rank; each rank takes every world-size-th of them.

    An error on one rank raises RolloutError on all.
    """
    world = groups.world
    own = range(world.rank, len(prompts), world.size)
    kept = _examples(prompts)

    def score_own() -> list[_Scored]:
        written = engine.generate([prompts[i] for i in own], sampling)
        return [_score(group, reward(group), keep=i in kept) for i, group in zip(own, written, strict=True)]

    shares = gather_all(score_own, world, "evaluation")
    scored = [shares[i % world.size][i // world.size] for i in range(len(prompts))]
    tasks: dict[str, list[_Scored]] = {}
    for prompt, result in zip(prompts, scored, strict=True):
        tasks.setdefault(prompt.sample.task, []).append(result)
    return Evaluation(
        tasks={task: _task_score(tasks[task]) for task in sorted(tasks)},
        examples=tuple(
            (RolloutGroup(prompt=prompts[i], rollouts=scored[i].rollouts), scored[i].rewards) for i in sorted(kept)
        ),
    )


def wilson_half_width(mean: float, count: int, z: float = 1.96) -> float:
    """Half the width of Wilson's score interval for `count` values in [0, 1] of this mean; NaN for none.

    Exact in form for values 0 and 1; an upper bound for graded ones (IoU, edit distance), whose variance is smaller.
    """
    if count == 0:
        return math.nan
    return z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))


@dataclass(frozen=True, slots=True)
class _Scored:
    """One prompt's results, a value for each rollout; its rollouts and rewards only where it is an example."""

    accuracy: tuple[float, ...]
    format: tuple[float, ...]
    length: tuple[int, ...]
    failures: int
    rollouts: tuple[Rollout, ...]
    rewards: tuple[RewardBreakdown, ...]


def _examples(prompts: Sequence[Prompt]) -> frozenset[int]:
    seen: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        seen.setdefault(prompt.sample.task, []).append(i)
    return frozenset(i for members in seen.values() for i in members[:EXAMPLES_PER_TASK])


def _score(group: RolloutGroup, rewards: tuple[RewardBreakdown, ...], *, keep: bool) -> _Scored:
    return _Scored(
        accuracy=tuple(0.0 if r.failure else r.components["accuracy"] for r in rewards),
        format=tuple(r.components["format"] for r in rewards if "format" in r.components),
        length=tuple(len(rollout.token_ids) for rollout in group.rollouts),
        failures=sum(r.failure is not None for r in rewards),
        rollouts=group.rollouts if keep else (),
        rewards=rewards if keep else (),
    )


def _task_score(results: Sequence[_Scored]) -> TaskScore:
    return TaskScore(
        accuracy=_mean(v for r in results for v in r.accuracy),
        format=_mean(v for r in results for v in r.format),
        length=_mean(v for r in results for v in r.length),
        prompts=len(results),
        failures=sum(r.failures for r in results),
    )


def _mean(values: Iterable[float]) -> Mean:
    """fsum rounds once, so the order and the number of ranks leave no trace."""
    listed = list(values)
    return Mean(total=math.fsum(listed), count=len(listed))
