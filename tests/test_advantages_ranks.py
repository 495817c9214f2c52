"""Advantages of every kind in real processes: the same bits for any number of data ranks, any split and any order."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_vlrl.config.schema import AdvantageConfig
from megatron_vlrl.parallel.groups import Group
from megatron_vlrl.train.estimate import estimate
from megatron_vlrl.train.minibatches import rows_of
from megatron_vlrl.train.rewards import gather_table
from megatron_vlrl.types import RewardBreakdown, RewardFailure, RewardTable, RolloutGroup, ScoredGroup
from tests.groups import make_group
from tests.spawn import run_ranks
from tests.test_advantages_oracle import CASES

pytestmark = pytest.mark.slow

TASKS = ("count", "read", "box")
POSITIONS = [int(p) for p in np.random.default_rng(5).permutation(200)[:24]]
WEIGHTS = {"accuracy": 0.9, "format": 0.1, "only read": -0.3}
Bits = dict[str, dict[int, tuple[bytes, ...]]]


def group_at(position: int) -> RolloutGroup:
    """1 to 8 rollouts of 1 to 20 tokens."""
    random = np.random.default_rng(position)
    return make_group(position, random.integers(1, 21, random.integers(1, 9)).tolist(), task=TASKS[position % 3])


def scored(group: RolloutGroup) -> ScoredGroup:
    """Ties, uniform groups, failures, and a component that one task alone has."""
    position, task = group.prompt.sample.position, group.prompt.sample.task
    random = np.random.default_rng([7, position])
    rewards = []
    for _ in group.rollouts:
        accuracy = 1.0 if position % 5 == 0 else random.integers(0, 4) / 3
        components = {"accuracy": accuracy, "format": float(random.integers(0, 2)) if position % 5 else 1.0}
        components |= {"only read": random.standard_normal()} if task == "read" else {}
        failed = random.random() < 0.1
        rewards.append(
            RewardBreakdown(
                components={} if failed else components,
                weights=WEIGHTS,
                total=math.nan if failed else sum(WEIGHTS[name] * value for name, value in components.items()),
                failure=RewardFailure(kind="error", message="no verdict") if failed else None,
            )
        )
    return ScoredGroup(group=group, rewards=tuple(rewards))


def table_of(positions: Sequence[int], data: Group) -> RewardTable:
    return gather_table([scored(group_at(position)) for position in positions], data, TASKS)


def own_bits(positions: Sequence[int], data: Group) -> Bits:
    """Case -> position -> values and flags of a rank's own groups, and the state, after two steps.

    Every rank puts the rows of the table in an order of its own first, and back in the end.
    """
    groups, table = [group_at(position) for position in positions], table_of(positions, data)
    order = np.random.default_rng([data.rank, data.size]).permutation(len(table.total))
    back = np.argsort(order)
    columns = ("position", "rollout", "task", "total", "components", "weights", "length", "peers")
    mixed = replace(table, **{name: getattr(table, name)[order] for name in columns})
    found: Bits = {}
    for kind, options in CASES:
        state: Mapping[str, Any] = {}
        for step in (1, 2):
            step_table = replace(mixed, total=step * mixed.total)
            result = estimate(step_table, AdvantageConfig(kind=kind, options=options), state)
            state = result.state
        parts = [part[back] for part in (result.values, result.uniform, result.tied, result.dropped)]
        found[f"{kind} {options}"] = {
            group.prompt.sample.position: (
                *(part[rows_of(table, group)].tobytes() for part in parts),
                json.dumps(state, sort_keys=True).encode(),
            )
            for group in groups
        }
    return found


def splits(world: int) -> Iterator[list[list[int]]]:
    """Which positions each rank has, in its order of arrival: uneven, and from two ranks on once with an empty one."""
    random = np.random.default_rng(world)
    for number in range(3):
        order = random.permutation(POSITIONS).tolist()
        cuts = sorted(random.choice(np.arange(1, len(order)), world - 1, replace=False).tolist())
        if number == 0 and cuts:
            cuts[-1] = len(order)
        yield [order[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(order)], strict=True)]


def bits_over_ranks() -> list[Bits]:
    """The bits of each split, on this rank."""
    data = Group(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    return [own_bits(split[data.rank], data) for split in splits(data.size)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_split_over_ranks_gives_the_same_bits(world: int) -> None:
    whole = own_bits(sorted(POSITIONS), Group.single())
    by_split = zip(*run_ranks(bits_over_ranks, world), strict=True)
    counts = [sorted(map(len, split)) for split in splits(world)]
    assert world == 1 or (0 in counts[0] and all(len(set(count)) > 1 for count in counts))
    for ranks in by_split:
        for case, expected in whole.items():
            joined = {position: bits for rank in ranks for position, bits in rank[case].items()}
            assert joined == expected, case


def test_the_table_has_all_that_may_differ() -> None:
    groups = [group_at(position) for position in POSITIONS]
    table = table_of(POSITIONS, Group.single())
    result = estimate(table, AdvantageConfig(), {})
    for flag in (result.uniform, result.tied, result.dropped):
        assert 5 < flag.sum() < len(flag) - 5
    assert np.isnan(table.components[~result.dropped]).any()
    assert {len(group.rollouts) for group in groups} >= {1, 8}
    assert len(np.unique(table.task)) == 3
