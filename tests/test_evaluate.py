"""Evaluation: exact over any number of ranks, failures counted, intervals as tabulated, random state untouched."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_vlrl.errors import RolloutError
from megatron_vlrl.parallel.groups import Group, ProcessGroups
from megatron_vlrl.rollout.evaluate import EXAMPLES_PER_TASK, Evaluation, TaskScore, evaluate, wilson_half_width
from megatron_vlrl.types import (
    Mean,
    Message,
    Prompt,
    RewardBreakdown,
    RewardFailure,
    Rollout,
    RolloutGroup,
    Sample,
    Sampling,
)
from tests.spawn import run_ranks

TASKS = ("count", "read", "box")
SAMPLING = Sampling(n=2, temperature=0.0, max_new_tokens=9, stop_token_ids=(1,))


def make_prompts(count: int) -> list[Prompt]:
    return [
        Prompt(
            sample=Sample(
                key=f"k{i}",
                task=TASKS[i % 3],
                messages=(Message(role="user", content="?"),),
                images=(),
                answer=i,
                position=i,
            ),
            token_ids=(63,),
            positions=np.zeros((3, 1), dtype=np.int64),
            grids=(),
            patches=(),
        )
        for i in range(count)
    ]


class Parrot:
    """Answers prompt i with 1 + i % 4 tokens, whoever asks."""

    needs_weights = False

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """One group for each prompt."""
        return [RolloutGroup(prompt=p, rollouts=tuple(self._write(p) for _ in range(sampling.n))) for p in prompts]

    def _write(self, prompt: Prompt) -> Rollout:
        n = 1 + prompt.sample.position % 4
        return Rollout(
            token_ids=(5,) * n,
            log_probs=np.zeros(n, dtype=np.float32),
            temperature=1.0,
            text="x",
            finish_reason="length",
            weight_version=0,
        )

    def update_weights(self, weights: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""


def reward(group: RolloutGroup) -> tuple[RewardBreakdown, ...]:
    """Accuracies that do not add up exactly in floating point; prompt 4's second reward fails; box has no format."""
    i = group.prompt.sample.position
    out = []
    for g in range(len(group.rollouts)):
        components = {"accuracy": (0.1 * i + 0.37 * g) % 1.0}
        if group.prompt.sample.task != "box":
            components["format"] = float(i % 2)
        failed = RewardFailure(kind="timeout", message="slow") if (i, g) == (4, 1) else None
        out.append(
            RewardBreakdown(
                components={} if failed else components,
                weights={"accuracy": 1.0},
                total=math.nan if failed else components["accuracy"],
                failure=failed,
            )
        )
    return tuple(out)


def world_groups() -> ProcessGroups:
    return replace(ProcessGroups.single(), world=Group(dist.get_rank(), dist.get_world_size(), dist.group.WORLD))


def evaluate_on_rank(count: int) -> Evaluation:
    return evaluate(Parrot(), make_prompts(count), SAMPLING, reward, world_groups())


def test_scores_are_means_over_each_task() -> None:
    prompts = make_prompts(14)
    result = evaluate(Parrot(), prompts, SAMPLING, reward, ProcessGroups.single())
    assert list(result.tasks) == sorted(TASKS)
    assert {task: score.prompts for task, score in result.tasks.items()} == {"count": 5, "read": 5, "box": 4}
    for task, score in result.tasks.items():
        own = [p.sample.position for p in prompts if p.sample.task == task]
        values = [0.0 if (i, g) == (4, 1) else (0.1 * i + 0.37 * g) % 1.0 for i in own for g in (0, 1)]
        assert score.accuracy.count == 2 * len(own)
        assert score.accuracy.value == pytest.approx(np.mean(values))
        assert score.length.value == pytest.approx(np.mean([1 + i % 4 for i in own]))
        assert score.half_width == wilson_half_width(score.accuracy.value, len(own))
    assert result.mean == pytest.approx(np.mean([score.accuracy.value for score in result.tasks.values()]))
    assert result.tasks["box"].format.count == 0
    assert result.tasks["count"].format.value == pytest.approx(2 / 5)
    assert (result.failures, result.tasks["read"].failures, result.tasks["read"].format.count) == (1, 1, 9)


def test_goals_are_reached_by_the_mean_and_by_every_task() -> None:
    def result(*accuracies: float) -> Evaluation:
        scores = {
            f"task{i}": TaskScore(
                accuracy=Mean(total=10 * accuracy, count=10),
                format=Mean(total=10, count=10),
                length=Mean(total=50, count=10),
                prompts=10,
                failures=0,
            )
            for i, accuracy in enumerate(accuracies)
        }
        return Evaluation(tasks=scores, examples=())

    assert result(0.2, 0.8).reaches(0.5, 0.2)
    assert not result(0.2, 0.7).reaches(0.5, 0.2)
    assert not result(0.1, 0.9).reaches(0.5, 0.2)
    assert not result(1.0).reaches(0.0, 0.0)
    assert not result().reaches(0.5, 0.0)


def test_three_ranks_give_the_bits_of_one() -> None:
    alone = evaluate(Parrot(), make_prompts(14), SAMPLING, reward, ProcessGroups.single())
    for shared in run_ranks(evaluate_on_rank, 3, 14):
        assert dict(shared.tasks) == dict(alone.tasks)
        assert [g.prompt.sample.key for g, _ in shared.examples] == [g.prompt.sample.key for g, _ in alone.examples]
        assert [[r.components for r in rewards] for _, rewards in shared.examples] == [
            [r.components for r in rewards] for _, rewards in alone.examples
        ]


def test_the_first_groups_of_every_task_are_kept_whole() -> None:
    result = evaluate(Parrot(), make_prompts(30), SAMPLING, reward, ProcessGroups.single())
    assert [g.prompt.sample.position for g, _ in result.examples] == list(range(3 * EXAMPLES_PER_TASK))
    for group, rewards in result.examples:
        assert len(group.rollouts) == len(rewards) == SAMPLING.n


def test_fewer_prompts_than_ranks_and_none_at_all() -> None:
    alone = evaluate(Parrot(), make_prompts(1), SAMPLING, reward, ProcessGroups.single())
    assert all(dict(shared.tasks) == dict(alone.tasks) for shared in run_ranks(evaluate_on_rank, 2, 1))
    empty = evaluate(Parrot(), [], SAMPLING, reward, ProcessGroups.single())
    assert empty.tasks == {}
    assert math.isnan(empty.mean)


def raise_on_rank_0() -> str:
    groups = world_groups()

    def failing(group: RolloutGroup) -> tuple[RewardBreakdown, ...]:
        if groups.world.rank == 0:
            raise RolloutError("no judge")
        return reward(group)

    with pytest.raises(RolloutError) as error:
        evaluate(Parrot(), make_prompts(4), SAMPLING, failing, groups)
    return str(error.value)


def test_an_error_on_one_rank_raises_on_all() -> None:
    assert run_ranks(raise_on_rank_0, 2) == ["evaluation failed on rank 0 of 2: RolloutError: no judge"] * 2


def test_random_state_is_untouched() -> None:
    def state() -> tuple[bytes, bytes, object]:
        return torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(), random.getstate()

    before = state()
    evaluate(Parrot(), make_prompts(6), SAMPLING, reward, ProcessGroups.single())
    assert state() == before


@pytest.mark.parametrize(
    ("mean", "count", "low", "high"),
    [(0.5, 100, 0.40383, 0.59617), (0.0, 10, 0.0, 0.27753), (0.9, 50, 0.78640, 0.95652)],
)
def test_the_half_width_is_that_of_wilsons_interval(mean: float, count: int, low: float, high: float) -> None:
    assert wilson_half_width(mean, count) == pytest.approx((high - low) / 2, abs=2e-4)


def test_the_half_width_covers_graded_values_and_shrinks_with_the_count() -> None:
    assert wilson_half_width(0.3, 400) < wilson_half_width(0.3, 100) < wilson_half_width(0.3, 10) < 0.5
    assert wilson_half_width(1.0, 20) > 0
    assert math.isnan(wilson_half_width(math.nan, 0))
