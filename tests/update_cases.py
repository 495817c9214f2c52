"""Updates to compare: ten groups of three tasks, a table of what is optimised, and the ways to cut the same step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from megatron_vlrl.algorithms import advantages
from megatron_vlrl.backends.protocol import Backend, UpdateResult
from megatron_vlrl.config.schema import AlgorithmConfig, EntropyConfig, KLConfig, LossConfig
from megatron_vlrl.packing import packed_tokens
from megatron_vlrl.parallel.groups import Group
from megatron_vlrl.train.minibatches import TrainGroup, make_minibatches, trains
from megatron_vlrl.train.rewards import gather_table
from megatron_vlrl.train.update import Updater, looks_at_every_token
from megatron_vlrl.types import RewardBreakdown, RolloutGroup, ScoredGroup
from tests.dense import Response, group_relative
from tests.reference import at_rate

# The task of a group is that of its position: three in turn. Their entropies lie above, inside and below their bands.
TASKS = ("above", "inside", "below", "absent")
IMAGES = [[(64, 64)], [], [(64, 96), (64, 64)], [], [], [(64, 64)], [], [], [], [(64, 64)]]
LENGTHS = [[5, 1], [4, 7, 2], [3, 3], [6, 2], [2, 5, 4], [1, 8], [4, 4, 3], [3, 2], [2, 6], [4, 1]]
LONGEST = 8
# Groups 3 and 9 are uniform: only terms that look at every token train them. The first reward of group 6 failed.
REWARDS = [
    [1.0, 0.0],
    [0.2, 0.9, 0.4],
    [0.0, 1.0],
    [0.5, 0.5],
    [0.1, 0.6, 0.3],
    [1.0, 0.0],
    [math.nan, 1.0, 0.2],
    [0.7, 0.1],
    [0.3, 0.8],
    [0.4, 0.4],
]
ALL = tuple(range(len(LENGTHS)))
UNIFORM = (3, 9)
HALVES = (ALL[:5], ALL[5:])  # the minibatches of a step of two
NOISE = 0.3  # of the sampler's log-probs
COEFFICIENT = 0.7  # so large that the shaping term weighs as much as the objective
KL = {"coefficient": 0.4, "by_task": {"inside": 0.0, "below": 0.9, "absent": 0.5}, "reference": "frozen"}


def task_of(position: int) -> str:
    return TASKS[position % 3]


# ---------------------------------------------------------------------- what is optimised


def algorithm(
    kind: str,
    options: Mapping[str, float],
    aggregation: str = "sequence_mean",
    importance: str = "none",
    *,
    cap: float = 2.0,
    kl: str | None = None,
    entropy: str | None = None,
) -> AlgorithmConfig:
    """kl, entropy: the estimators of these terms; None: without. Bands are those of `with_bands`."""
    return AlgorithmConfig(
        loss=LossConfig(kind=kind, options=options, aggregation=aggregation, importance=importance, importance_cap=cap),
        kl=KLConfig(**KL, estimator=kl) if kl else KLConfig(),
        entropy=EntropyConfig(coefficient=COEFFICIENT, estimator=entropy) if entropy else EntropyConfig(),
    )


PPO = {"clip_low": 0.2, "clip_high": 0.2}
HIGHER = {"clip_low": 0.2, "clip_high": 0.28}
RESPONSES = {"clip_low": 0.05, "clip_high": 0.08}
CASES: dict[str, AlgorithmConfig] = {
    "ppo_clip": algorithm("ppo_clip", PPO),
    "clip_higher": algorithm("ppo_clip", HIGHER, "token_mean"),
    "dual_clip": algorithm("dual_clip", HIGHER | {"clip_c": 1.4}, "constant"),
    "gspo": algorithm("gspo", RESPONSES),
    "gspo by tokens": algorithm("gspo", RESPONSES, "token_mean"),
    "cispo": algorithm("cispo", {"clip_low": 0.2, "clip_high": 0.3}, "token_mean"),
    "sapo": algorithm("sapo", {"tau_pos": 2.0, "tau_neg": 3.5}, "constant"),
    "token_tis": algorithm("ppo_clip", HIGHER, importance="token_tis", cap=1.2),
    "sequence_mask": algorithm("dual_clip", HIGHER | {"clip_c": 1.2}, "token_mean", "sequence_mask", cap=1.6),
    "k1": algorithm("ppo_clip", PPO, "token_mean", kl="k1"),
    "k2": algorithm("ppo_clip", PPO, "constant", kl="k2"),
    "k3": algorithm("ppo_clip", PPO, kl="k3"),
    "full": algorithm("ppo_clip", HIGHER, entropy="full"),
    "nll": algorithm("ppo_clip", HIGHER, entropy="nll"),
    "score": algorithm("ppo_clip", HIGHER, "token_mean", entropy="score"),
    "all terms": algorithm("ppo_clip", HIGHER, "token_mean", "token_tis", cap=1.2, kl="k3", entropy="full"),
    "all of responses": algorithm("gspo", RESPONSES, "constant", "sequence_mask", cap=1.6, kl="k2", entropy="score"),
}
# Also taken as a step of two updates that move the weights.
TWICE = ("clip_higher", "token_tis", "sequence_mask", "all terms", "all of responses")


def bands_around(measured: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """A fifth of a nat off the tasks' means, and so that each lies where its name says."""
    above, inside, below = (measured[name] for name in TASKS[:3])
    return {
        "above": (0.0, above - 0.2),
        "inside": (inside - 0.2, inside + 0.2),
        "below": (below + 0.2, below + 1.0),
        "absent": (0.1, 0.2),
    }


def with_bands(case: AlgorithmConfig, measured: Mapping[str, Mapping[str, float]]) -> AlgorithmConfig:
    """measured: by task the means of "nll" and of "full", which the estimator "score" shares."""
    means = measured["nll" if case.entropy.estimator == "nll" else "full"]
    return replace(case, entropy=replace(case.entropy, bands=bands_around(means)))


# ---------------------------------------------------------------------- the step, as written


def by_response(column: Tensor) -> list[Tensor]:
    """Columns over all tokens, in the order of the groups, as one for each response."""
    return list(column.split([length for row in LENGTHS for length in row]))


def responses_of(columns: Mapping[str, Tensor], positions: Sequence[int] = ALL) -> list[Response]:
    """Those of some groups. columns: all but task and advantage of a `Response`, over all tokens."""
    split = {name: by_response(column) for name, column in columns.items()}
    places = [(position, number) for position, row in enumerate(LENGTHS) for number in range(len(row))]
    return [
        Response(
            task=task_of(position),
            advantage=group_relative(REWARDS[position])[number],
            **{name: parts[place] for name, parts in split.items()},
        )
        for place, (position, number) in enumerate(places)
        if position in positions
    ]


def computed_of(case: AlgorithmConfig, positions: Sequence[int] = ALL) -> list[int]:
    """The groups whose tokens the loss depends on."""
    every_token = case.kl.reference != "none" or case.entropy.coefficient > 0
    return [position for position in positions if every_token or position not in UNIFORM]


def with_sampler(groups: Sequence[RolloutGroup], log_probs: Tensor) -> list[RolloutGroup]:
    """The groups with the log-probs that they were drawn with, over all tokens."""
    parts = iter(by_response(log_probs.float()))
    return [
        replace(group, rollouts=tuple(replace(one, log_probs=next(parts).numpy()) for one in group.rollouts))
        for group in groups
    ]


# ---------------------------------------------------------------------- the step, as the trainer takes it


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A cut of the step. split: positions of each data rank. tokens: of a microbatch. singly: as groups of one.
    every_token: whether uniform groups are computed; None: where a term looks at them."""

    split: Sequence[Sequence[int]] = (ALL,)
    tokens: int = 10**6
    singly: bool = False
    every_token: bool | None = None


PLANS = {
    "one microbatch": Plan(),
    "many microbatches": Plan(tokens=1),
    "groups of one": Plan(singly=True),
    "uniform groups computed": Plan(every_token=True),
}
DATA_PLANS = {
    "four microbatches each": Plan(split=((6, 1, 4, 3, 8), (2, 7, 0, 5, 9)), tokens=1),
    "a rank without groups": Plan(split=(ALL, ())),
}


@dataclass(frozen=True, kw_only=True)
class Taken:
    """One update: what it reported, on how many microbatches of this rank, and its gradients by name."""

    update: UpdateResult
    microbatches: int
    gradients: Mapping[str, Tensor] = field(default_factory=dict)


def take(
    backend: Backend,
    groups: Sequence[RolloutGroup],
    case: AlgorithmConfig,
    plan: Plan = PLANS["one microbatch"],
    *,
    minibatches: Sequence[Sequence[int]] = (ALL,),
    lr: float = 0.0,
) -> list[Taken]:
    """The updates of a step, one for each of `minibatches`, through its stages from rewards on."""
    updater = Updater(backend=backend, task_names=TASKS, microbatch_tokens=plan.tokens, cost=packed_tokens)
    members = members_of(groups, case, plan, backend.groups.data, minibatches)
    taken = []
    for batches in updater.prepare(members, case, version=0):
        update = updater.update(batches, case, at_rate(lr))
        gradients = {name: gradient.clone() for name, gradient in backend.hf_gradients()}
        taken.append(Taken(update=update, microbatches=len(batches), gradients=gradients))
    return taken


def members_of(
    groups: Sequence[RolloutGroup],
    case: AlgorithmConfig,
    plan: Plan,
    data: Group,
    minibatches: Sequence[Sequence[int]],
) -> list[list[TrainGroup]]:
    """This rank's part of each minibatch: rewards, table, advantages, weights."""
    scored = [ScoredGroup(group=groups[position], rewards=rewards_of(position)) for position in plan.split[data.rank]]
    table = gather_table(scored, data, TASKS)
    result = advantages(table.total, table.task, table.position, "grpo", table.components)
    every_token = looks_at_every_token(case) if plan.every_token is None else plan.every_token
    moving = trains(table, result, every_token=every_token)
    moved = set(table.position[moving].tolist())
    cut = make_minibatches(
        [one.group for one in scored if one.position in moved],
        table,
        result,
        moving=moving,
        chosen={position: number for number, part in enumerate(minibatches) for position in part},
        aggregation=case.loss.aggregation,
        constant=LONGEST,
    )
    return [[part for member in one.groups for part in (one_each(member) if plan.singly else [member])] for one in cut]


def rewards_of(position: int) -> tuple[RewardBreakdown, ...]:
    return tuple(RewardBreakdown(components={}, weights={}, total=total) for total in REWARDS[position])


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


# ---------------------------------------------------------------------- comparing


def flat(gradients: Mapping[str, Tensor]) -> Tensor:
    """The global gradient, float64."""
    return torch.cat([gradients[name].flatten().double() for name in sorted(gradients)])


def check_sums(update: UpdateResult, expected: Mapping[str, Mapping[str, float]], tolerance: float) -> None:
    """What an update reported by task equals what was worked out; and nothing at all of the task that is absent."""
    for name, by_task in expected.items():
        wanted = [by_task.get(task, 0.0) for task in TASKS]
        np.testing.assert_allclose(update.sums[name], wanted, rtol=tolerance, atol=tolerance, err_msg=name)
    for name, values in update.sums.items():
        assert name == "loss" or not np.any(values[TASKS.index("absent")]), name


def mean_by_task(column: Tensor) -> dict[str, float]:
    """Over each task's tokens."""
    parts = column.detach().split([sum(row) for row in LENGTHS])
    return {task: float(torch.cat(parts[number::3]).mean()) for number, task in enumerate(TASKS[:3])}
