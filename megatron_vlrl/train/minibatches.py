"""One table of rewards and advantages -> which groups train in which update, and the weight of each response.

Everything follows from the global table, so it is the same for every layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_vlrl.algorithms.weights import token_weights
from megatron_vlrl.packing import filler_group
from megatron_vlrl.types import AdvantageResult, RewardTable, RolloutGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainGroup:
    """A group with what training needs of each rollout, float64[G]: its advantage and the weight of its tokens.

    counted: whether its tokens enter the means; not so for one that only keeps a rank without work in step.
    """

    group: RolloutGroup
    advantages: NDArray[np.float64]
    weights: NDArray[np.float64]
    task: int
    counted: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Minibatch:
    """This rank's groups of one optimizer update. trained: responses that move the weights, over all ranks; 0: nothing
    to do."""

    groups: tuple[TrainGroup, ...]
    trained: int


def filler() -> TrainGroup:
    """A group of two tokens without any effect, for a rank that has nothing to learn from while others have."""
    return TrainGroup(group=filler_group(), advantages=np.zeros(1), weights=np.zeros(1), task=0, counted=False)


def rows_of(table: RewardTable, group: RolloutGroup) -> slice:
    """Where a group's rollouts stand in the table."""
    position = group.prompt.sample.position
    start, end = np.searchsorted(table.position, [position, position + 1]).tolist()
    return slice(start, end)


def trains(table: RewardTable, advantages: AdvantageResult, *, every_token: bool) -> NDArray[np.bool_]:
    """Which rows must be computed in the update, bool[N].

    Whole groups: one whose advantages are all 0 moves nothing, so its tokens need not be computed, unless `every_token`
    counts (entropy shaping and the divergence from a reference look at all generated tokens).
    """
    if every_token:
        return np.ones(len(table.position), dtype=np.bool_)
    _, group = np.unique(table.position, return_inverse=True)
    moving = np.zeros(group.max(initial=-1) + 1, dtype=np.bool_)
    np.logical_or.at(moving, group, advantages.values != 0.0)
    return moving[group]


def assign(table: RewardTable, moving: NDArray[np.bool_], count: int, key: Sequence[int]) -> dict[int, int]:
    """position -> minibatch, for all groups: each task is dealt out evenly, in an order drawn from `key`.

    First those that move, then the others, whose part is to be counted in the denominators.
    """
    draw = np.random.Generator(np.random.Philox(np.random.SeedSequence(list(key))))
    chosen: dict[int, int] = {}
    for task in range(len(table.task_names)):
        inside = table.task == task
        offset = int(draw.integers(count))
        dealt = [draw.permutation(np.unique(table.position[inside & rows])) for rows in (moving, ~moving)]
        for place, position in enumerate(np.concatenate(dealt).tolist()):
            chosen[position] = (place + offset) % count
    return chosen


def make_minibatches(
    groups: Sequence[RolloutGroup],
    table: RewardTable,
    advantages: AdvantageResult,
    *,
    moving: NDArray[np.bool_],
    chosen: Mapping[int, int],
    aggregation: str,
    constant: int,
) -> list[Minibatch]:
    """Cut this rank's `groups` into the minibatches of `chosen`; the weights' denominators count rows of all ranks.

    Every response with a valid reward is in the denominators, whether it moves or not: so the objective is the mean
    that is written down, and leaving out what does not move changes no result. constant: the greatest length of a
    response, which the aggregation of that name divides by.
    """
    minibatch = np.array([chosen.get(position, -1) for position in table.position.tolist()])
    own = {group.prompt.sample.position: group for group in groups}
    result = []
    for number in range(max(chosen.values(), default=-1) + 1):
        inside = (minibatch == number) & ~advantages.dropped
        responses, tokens = int(inside.sum()), int(table.length[inside].sum())
        weights = token_weights(
            table.length, inside, aggregation, responses=responses, tokens=tokens, constant=constant
        )
        members = [
            TrainGroup(
                group=own[position],
                advantages=advantages.values[rows],
                weights=weights[rows],
                task=int(table.task[rows.start]),
            )
            for position in sorted(p for p, m in chosen.items() if m == number and p in own)
            for rows in [rows_of(table, own[position])]
        ]
        result.append(Minibatch(groups=tuple(members), trained=int((inside & moving).sum())))
    return result
