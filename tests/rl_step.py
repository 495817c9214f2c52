"""One RL step by the trainer's own stages on canned answers and rewards: its metrics, which no layout may change.

Eight groups of three tasks, whose entropies lie above, inside and below their bands; one group's rewards are all equal,
and one reward failed. Two minibatches; data ranks start with uneven work, so that groups travel.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megatron_vlrl.backends.protocol import Backend, OptimizerStep, UpdateResult
from megatron_vlrl.config.schema import AlgorithmConfig, Config, EntropyConfig, TrainConfig
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.models.qwen3_vl.cost import group_cost, unit_costs
from megatron_vlrl.train.divide import divide
from megatron_vlrl.train.estimate import estimate
from megatron_vlrl.train.minibatches import TrainGroup
from megatron_vlrl.train.rewards import gather_table, score_groups
from megatron_vlrl.train.statistics import step_means, step_scalars
from megatron_vlrl.train.update import Updater
from megatron_vlrl.types import RewardBreakdown, RewardFailure, RolloutGroup, StepStats
from tests.reference import hf_scores, make_groups, renderer_and_sampling
from tests.update_cases import one_each

TASKS = ("above", "inside", "below", "absent")
# By position, of the task `position % 3`. Even ones are more work: the first of two data ranks begins with them.
IMAGES = [[(64, 64)], [], [(64, 96), (64, 64)], [], [(64, 64)], [], [(64, 96)], []]
LENGTHS = [[5, 1, 4], [4, 2], [6, 3, 3], [2, 5], [7, 2, 4], [1, 3], [4, 4], [3, 2]]
NAN = math.nan
REWARDS = [
    [1.0, 0.0, 0.3],
    [0.2, 0.9],
    [0.0, 1.0, 1.0],
    [0.5, 0.5],
    [0.1, 0.6, 0.3],
    [0.0, 1.0],
    [NAN, 0.4],
    [0.7, 0.1],
]
MINIBATCHES = 2
COEFFICIENT = 0.1
FILE = "rl_step.pkl"


@dataclass(frozen=True)
class Answers:
    """groups: all of them, with their sampler's log-probs. bands: of the tasks' entropies."""

    groups: Sequence[RolloutGroup]
    bands: dict[str, tuple[float, float]]


def write_answers(folder: Path) -> None:
    """Into `folder`: groups with log-probs a little off those of the model that lies there, and bands."""
    renderer, sampling = renderer_and_sampling(folder)
    groups = make_groups(renderer, IMAGES, LENGTHS, [TASKS[position % 3] for position in range(len(LENGTHS))])
    log_probs, entropies, _ = hf_scores(folder, groups, sampling)
    noise = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(9))
    lengths = [length for row in LENGTHS for length in row]
    old = iter((log_probs.detach() + 0.3 * noise).float().split(lengths))
    groups = [
        replace(group, rollouts=tuple(replace(rollout, log_probs=next(old).numpy()) for rollout in group.rollouts))
        for group in groups
    ]
    of_group = [part.detach() for part in entropies.split([sum(row) for row in LENGTHS])]
    above, inside, below = (float(torch.cat(of_group[task::3]).mean()) for task in range(3))
    bands = {"above": (0.0, above - 0.5), "inside": (inside - 0.5, inside + 0.5), "below": (below + 0.5, below + 1.0)}
    (folder / FILE).write_bytes(pickle.dumps(Answers(groups, bands | {"absent": (0.1, 0.2)})))


def canned_rewards(group: RolloutGroup) -> tuple[RewardBreakdown, ...]:
    """Accuracy and format, or a failure that knows the format alone."""
    return tuple(
        RewardBreakdown(
            components={"format": 1.0}, weights={}, total=NAN, failure=RewardFailure(kind="error", message="")
        )
        if math.isnan(total)
        else RewardBreakdown(components={"format": float(total > 0), "accuracy": total}, weights={}, total=total)
        for total in REWARDS[group.prompt.sample.position]
    )


@dataclass(frozen=True)
class Measured:
    """What the step reports. loss_size: about what the terms of its loss add up to without their signs."""

    stats: StepStats
    loss_size: float


def rl_step(backend: Backend, folder: Path, step: OptimizerStep, *, microbatch_tokens: int, single: bool) -> Measured:
    """A step as the loop takes it once the answers are there. single: a row for each response."""
    answers: Answers = pickle.loads((folder / FILE).read_bytes())
    algorithm = AlgorithmConfig(entropy=EntropyConfig(coefficient=COEFFICIENT, bands=answers.bands))
    settings = Config(algorithm=algorithm, train=TrainConfig(minibatches=MINIBATCHES))
    data, cost = backend.groups.data, partial(group_cost, unit=unit_costs(Qwen3VLSpec.load(folder)))
    scored = score_groups(answers.groups[data.rank :: data.size], canned_rewards, backend.groups.model)
    table = gather_table(scored, data, TASKS)
    result = estimate(table, algorithm.advantage, {})
    division = divide(scored, table, result, settings, step=0, cost=cost, data=data)
    updater = Updater(backend=backend, task_names=TASKS, microbatch_tokens=microbatch_tokens, cost=cost)
    members = [_members(update, single) for update in division.updates]
    updates = [updater.update(batches, algorithm, step) for batches in updater.prepare(members, algorithm, version=0)]
    _check_sides(updates, answers.bands)
    means = step_means([table], table, result, updates, settings.reward)
    scalars = division.shares.scalars() | step_scalars(table, result, updates)
    shaping = COEFFICIENT * sum(means[f"entropy/{task}"].value for task in ("above", "below"))
    return Measured(
        stats=StepStats(step=1, means=means, scalars=scalars, seconds={}),
        loss_size=float(np.abs(result.values[~result.dropped]).mean()) + shaping,
    )


def _members(update: Sequence[TrainGroup], single: bool) -> list[TrainGroup]:
    return [one for member in update for one in (one_each(member) if single else [member])]


def _check_sides(updates: Sequence[UpdateResult], bands: Mapping[str, tuple[float, float]]) -> None:
    """The step is worth comparing: at each of its updates a task lies above its band, one inside and one below."""
    for update in updates:
        above, inside, below = (update.sums["entropy"] / update.sums["tokens"])[:3]
        assert above > bands["above"][1]
        assert bands["inside"][0] < inside < bands["inside"][1]
        assert below < bands["below"][0]


def metric_errors(got: Measured, alone: Measured, data: int) -> dict[str, float]:
    """Of all means and scalars, relative to those of one process; their names and the means' counts are equal.

    How even the work of the `data` ranks is may differ: of that it is only asked that groups travelled. The loss is a
    sum of terms of both signs, which may cancel to rounding, so it is held to their size.
    """
    before, after = (got.stats.scalars[f"balance/{when}"] for when in ("before", "after"))
    assert before > after >= 1.0 if data > 1 else before == after == 1.0
    assert {name: mean.count for name, mean in got.stats.means.items()} == {
        name: mean.count for name, mean in alone.stats.means.items()
    }
    ours, theirs = ({k: v for k, v in m.stats.flat().items() if not k.startswith("balance/")} for m in (got, alone))
    assert set(ours) == set(theirs)
    sizes = {name: abs(value) for name, value in theirs.items()} | {"loss": alone.loss_size}
    return {name: _relative(ours[name], theirs[name], sizes[name]) for name in theirs}


def _relative(got: float, expected: float, size: float) -> float:
    """0 for equal values, also where the size is 0; infinite for others of size 0 and for what is not finite."""
    if got == expected:
        return 0.0
    return abs(got - expected) / size if size and math.isfinite(got - expected) else math.inf
