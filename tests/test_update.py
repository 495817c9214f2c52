"""An update of the real backend: the clipped objective and entropy shaping, exact for any split, cut and packing.

The measure is dense autograd in float64 through transformers on padded rows, with the hinges as they are defined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vlrl.algorithms import advantages
from megatron_vlrl.config.schema import AlgorithmConfig, EntropyConfig, LossConfig
from megatron_vlrl.models.qwen3_vl.render import Renderer
from megatron_vlrl.packing import packed_tokens
from megatron_vlrl.parallel.groups import Group
from megatron_vlrl.train.minibatches import TrainGroup, assign, make_minibatches, trains
from megatron_vlrl.train.rewards import gather_table
from megatron_vlrl.train.update import Updater
from megatron_vlrl.types import RewardBreakdown, RolloutGroup, ScoredGroup
from tests.reference import (
    at_rate,
    backend_options,
    gradients_of,
    hf_scores,
    make_groups,
    relative,
    renderer_and_sampling,
)
from tests.spawn import run_ranks
from tests.tiny import make_tiny

TASKS = ("above", "inside", "below", "absent")
IMAGES = [[(64, 64)], [], [(64, 96), (64, 64)], [], [], [(64, 64)], [], []]
LENGTHS = [[5, 1], [4, 7, 2], [3, 3], [6], [2, 5, 4], [1, 8], [4, 4], [3, 2]]
# Group 3 is alone, so uniform: it moves by its entropy only. Group 6's first reward failed.
REWARDS = [[1.0, 0.0], [0.2, 0.9, 0.4], [0.0, 1.0], [0.5], [0.1, 0.6, 0.3], [1.0, 0.0], [np.nan, 1.0], [0.7, 0.1]]
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
COEFFICIENT = 0.7  # so large that the shaping term weighs as much as the objective


def step_groups(renderer: Renderer) -> list[RolloutGroup]:
    """Eight groups of three tasks."""
    tasks = [TASKS[number % 3] for number in range(len(LENGTHS))]
    return make_groups(renderer, IMAGES, LENGTHS, tasks)


def step_rewards() -> list[tuple[RewardBreakdown, ...]]:
    return [tuple(RewardBreakdown(components={}, weights={}, total=value) for value in row) for row in REWARDS]


@dataclass(frozen=True)
class Expected:
    """What the update must give: loss, gradients by name, entropy sums, and the bands that put a task on each side."""

    loss: float
    gradients: Mapping[str, torch.Tensor]
    entropies: Mapping[str, float]
    bands: Mapping[str, tuple[float, float]]
    groups: Sequence[RolloutGroup]  # with the log-probs of their sampler


def bands_around(mean: Sequence[float]) -> dict[str, tuple[float, float]]:
    return {
        "above": (0.0, mean[0] - 0.5),
        "inside": (mean[1] - 0.5, mean[1] + 0.5),
        "below": (mean[2] + 0.5, mean[2] + 1.0),
        "absent": (0.1, 0.2),
    }


def expected_update(folder: Path, estimator: str) -> Expected:
    """By definition: mean over responses of token means of the clipped objective, plus the hinges of the tasks."""
    renderer, sampling = renderer_and_sampling(folder)
    groups = step_groups(renderer)
    log_probs, entropies, model = hf_scores(folder, groups, sampling)
    noise = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(9))
    old = (log_probs.detach() + 0.3 * noise).float()
    groups = with_log_probs(groups, old.numpy())

    rewards = [value for row in REWARDS for value in row]
    task = [number % 3 for number, row in enumerate(REWARDS) for _ in row]
    group = [number for number, row in enumerate(REWARDS) for _ in row]
    result = advantages(np.array(rewards), np.array(task), np.array(group), "grpo", np.zeros((len(task), 0)))
    lengths = torch.tensor([length for row in LENGTHS for length in row])
    kept = torch.tensor(~np.isnan(rewards))
    advantage = torch.tensor(result.values).float().double().repeat_interleave(lengths)
    ratio = (log_probs - old.double()).exp()
    surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    means = torch.stack([part.mean() for part in surrogate.split(lengths.tolist())])
    surprise = entropies if estimator == "full" else -log_probs
    of_token = torch.tensor(task).repeat_interleave(lengths)
    task_means = [surprise[of_token == number].mean() for number in range(3)]
    bands = bands_around([float(mean.detach()) for mean in task_means])
    hinges = sum(
        torch.relu(mean - bands[name][1]) + torch.relu(bands[name][0] - mean)
        for name, mean in zip(TASKS, task_means, strict=False)
    )
    objective = -means[kept].mean()
    (objective + COEFFICIENT * hinges).backward()
    # The trained term is the hinges' linear part: the same gradient, and a value without the bands' constants.
    linear = COEFFICIENT * (task_means[0] - task_means[2])
    return Expected(
        loss=float((objective + linear).detach()),
        gradients=gradients_of(model),
        entropies={name: float(entropies[of_token == number].sum().detach()) for number, name in enumerate(TASKS)},
        bands=bands,
        groups=groups,
    )


def with_log_probs(groups: Sequence[RolloutGroup], log_probs: np.ndarray) -> list[RolloutGroup]:
    parts = iter(np.split(log_probs, np.cumsum([n for row in LENGTHS for n in row])[:-1]))
    return [
        replace(group, rollouts=tuple(replace(rollout, log_probs=next(parts)) for rollout in group.rollouts))
        for group in groups
    ]


def one_each(member: TrainGroup) -> list[TrainGroup]:
    """The same responses as groups of one: what a trainer of padded rows would compute."""
    return [
        replace(
            member,
            group=replace(member.group, rollouts=(rollout,)),
            advantages=member.advantages[number : number + 1],
            weights=member.weights[number : number + 1],
        )
        for number, rollout in enumerate(member.group.rollouts)
    ]


# name -> (positions of each data rank, packed tokens of a microbatch, groups of one)
PLANS: dict[str, tuple[list[list[int]], int, bool]] = {
    "one microbatch": ([list(range(8))], 10**6, False),
    "groups of one": ([list(range(8))], 10**6, True),
    "four microbatches each": ([[6, 1, 4, 3], [2, 7, 0, 5]], 1, False),
    "a rank without groups": ([list(range(8)), []], 10**6, False),
}


def updates(folder: Path, parallel: Mapping[str, int], estimator: str, plans: Sequence[str]) -> dict[str, Any]:
    """Loss, gradients and report of the update for each plan."""
    from megatron_vlrl.backends import build_backend

    expected: Expected = torch.load(folder / f"{estimator}.pt", weights_only=False)
    _, sampling = renderer_and_sampling(folder)
    backend = build_backend(backend_options(folder, sampling, **parallel))
    data = backend.groups.data
    results = {}
    for plan in plans:
        split, tokens, singly = PLANS[plan]
        algorithm = AlgorithmConfig(
            loss=LossConfig(options=CLIP, importance="none"),
            entropy=EntropyConfig(coefficient=COEFFICIENT, estimator=estimator, bands=expected.bands),
        )
        updater = Updater(backend=backend, task_names=TASKS, microbatch_tokens=tokens, cost=packed_tokens)
        members = members_of(expected.groups, split[data.rank], data, singly=singly)
        (batches,) = updater.prepare([members], algorithm, version=0)
        update = updater.update(batches, algorithm, at_rate(0.0))
        results[plan] = {
            "batches": len(batches),
            "gradients": {name: gradient.clone() for name, gradient in backend.hf_gradients()},
            "sums": update.sums,
            "maxima": update.maxima,
            "norm": update.grad_norm,
        }
    backend.close()
    return results


def members_of(
    groups: Sequence[RolloutGroup], positions: Sequence[int], data: Group, *, singly: bool
) -> list[TrainGroup]:
    """Through the stages of a step: rewards, table, advantages, minibatch."""
    rewards = step_rewards()
    own = [groups[position] for position in positions]
    scored = [ScoredGroup(group=groups[position], rewards=rewards[position]) for position in positions]
    table = gather_table(scored, data, TASKS)
    result = advantages(table.total, table.task, table.position, "grpo", table.components)
    rows = trains(table, result, every_token=True)
    chosen = assign(table, rows, 1, (0,))
    (minibatch,) = make_minibatches(
        own, table, result, moving=rows, chosen=chosen, aggregation="sequence_mean", constant=1
    )
    return [part for member in minibatch.groups for part in (one_each(member) if singly else [member])]


@dataclass(frozen=True)
class Case:
    """A folder with the expected updates, and the whole step in one microbatch of one process."""

    folder: Path
    expected: Mapping[str, Expected]
    alone: Mapping[str, dict[str, Any]]


def prepare(folder: Path) -> dict[str, dict[str, Any]]:
    """Write the expected updates, then do them in one process."""
    for estimator in ("full", "nll"):
        torch.save(expected_update(folder, estimator), folder / f"{estimator}.pt")
    full = updates(folder, {}, "full", ["one microbatch", "groups of one"])
    return full | {"nll": updates(folder, {}, "nll", ["one microbatch"])["one microbatch"]}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = make_tiny(tmp_path_factory.mktemp("model"), layers=2)
    (alone,) = run_ranks(prepare, 1, folder)
    expected = {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in ("full", "nll")}
    return Case(folder, expected, alone)


def worst(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Greatest relative error of a gradient; those that are nothing but rounding are held to the size of the others."""
    assert set(got) == set(expected)
    typical = max(float(gradient.norm()) for gradient in expected.values())
    return max(
        float((got[name] - gradient).norm() / gradient.norm().clamp_min(1e-3 * typical))
        for name, gradient in expected.items()
    )


def test_the_expected_step_has_a_task_on_each_side(case: Case) -> None:
    expected = case.expected["full"]
    counts = dict.fromkeys(TASKS, 0)
    for number, lengths in enumerate(LENGTHS):
        counts[TASKS[number % 3]] += sum(lengths)
    means = {name: expected.entropies[name] / counts[name] for name in TASKS[:3]}
    assert means["above"] > expected.bands["above"][1]
    assert expected.bands["inside"][0] < means["inside"] < expected.bands["inside"][1]
    assert means["below"] < expected.bands["below"][0]
    assert counts["absent"] == 0


@pytest.mark.parametrize(("plan", "estimator"), [("one microbatch", "full"), ("nll", "nll")])
def test_the_update_equals_hinges_and_clipped_ratio_by_dense_autograd(case: Case, plan: str, estimator: str) -> None:
    expected, update = case.expected[estimator], case.alone[plan]
    assert update["batches"] == 1
    assert update["sums"]["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert worst(update["gradients"], expected.gradients) < 1e-5
    for name in TASKS:
        measured = update["sums"]["entropy"][TASKS.index(name)]
        assert measured == pytest.approx(expected.entropies[name], rel=1e-5)
    assert update["sums"]["tokens"].sum() == sum(map(sum, LENGTHS))
    assert 0 < update["sums"]["clip_fraction"].sum() < update["sums"]["tokens"].sum()
    sides = update["sums"]["entropy_side"][:3] / update["sums"]["tokens"][:3]
    assert sides.tolist() == [1.0, 0.0, -1.0]


def test_grouped_rows_equal_the_same_responses_in_rows_of_their_own(case: Case) -> None:
    grouped, single = case.alone["one microbatch"], case.alone["groups of one"]
    assert single["sums"]["loss"] == pytest.approx(grouped["sums"]["loss"], rel=1e-5)
    assert worst(single["gradients"], grouped["gradients"]) < 1e-5


def flat(gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def same_update(update: dict[str, Any], alone: dict[str, Any]) -> None:
    assert set(update["sums"]) == set(alone["sums"])
    assert (
        relative(flat(update["gradients"]), flat(alone["gradients"])) < 4e-6
    )  # float32 itself: 2.1e-6 from the dense float64
    for name, value in alone["sums"].items():
        if name not in ("ratios", "mismatches"):  # a token at a bin's edge may fall on either side
            np.testing.assert_allclose(update["sums"][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        assert update["sums"][name].sum() == pytest.approx(value.sum(), rel=1e-5, abs=1e-6)
    assert update["maxima"] == pytest.approx(alone["maxima"], rel=1e-5)
    assert update["norm"] == pytest.approx(alone["norm"], rel=1e-5)
    assert worst(update["gradients"], alone["gradients"]) < 1e-5


def test_two_data_ranks_and_four_microbatches_make_the_same_update(case: Case) -> None:
    plans = ["four microbatches each", "a rank without groups"]
    for rank in run_ranks(updates, 2, case.folder, {"data": 2}, "full", plans):
        assert rank["four microbatches each"]["batches"] == 4
        assert rank["a rank without groups"]["batches"] == 1
        for plan in plans:
            same_update(rank[plan], case.alone["one microbatch"])


def test_two_stages_make_the_same_update(case: Case) -> None:
    for rank in run_ranks(updates, 2, case.folder, {"pipeline": 2}, "full", ["one microbatch"]):
        same_update(rank["one microbatch"], case.alone["one microbatch"])
