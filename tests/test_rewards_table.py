"""One table of rewards, the same bits for any split over data ranks; a verifier runs once for a response."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch.distributed as dist

from megatron_vlrl.parallel.collectives import gather_objects
from megatron_vlrl.parallel.groups import Group
from megatron_vlrl.train.rewards import Rewards, gather_table, score_groups
from megatron_vlrl.types import RewardBreakdown, RewardFailure, RewardTable, RolloutGroup
from tests.groups import make_group
from tests.spawn import run_ranks

TASKS = ("count", "read", "unseen")
LENGTHS = {7: [3, 1], 2: [4, 4, 2], 30: [1], 11: [2, 5, 3], 5: [6, 1]}
# Which positions each rank holds, in its order of arrival; one split leaves a rank empty.
SPLITS: dict[int, list[list[list[int]]]] = {
    2: [[[7, 2], [30, 11, 5]], [[5, 30, 2, 7], [11]], [[], [2, 5, 7, 11, 30]]],
    3: [[[7], [2, 30], [11, 5]], [[11, 5, 7], [], [30, 2]]],
}


def groups_at(positions: Sequence[int]) -> list[RolloutGroup]:
    return [make_group(p, LENGTHS[p], task=TASKS[p % 2]) for p in positions]


def reward(group: RolloutGroup) -> Rewards:
    """Different for every response; one fails, and each task has a component of its own."""
    position, task = group.prompt.sample.position, group.prompt.sample.task
    rewards = []
    for number, rollout in enumerate(group.rollouts):
        components = {"accuracy": position / 7 + number / 3, f"only {task}": float(rollout.token_ids[0])}
        failed = (position, number) == (11, 1)
        rewards.append(
            RewardBreakdown(
                components={} if failed else components,
                weights={},
                total=math.nan if failed else position / 3 + number / 11,
                failure=RewardFailure(kind="timeout", message="late") if failed else None,
            )
        )
    return tuple(rewards)


def table_of(positions: Sequence[int], data: Group) -> RewardTable:
    groups = groups_at(positions)
    return gather_table(groups, [reward(group) for group in groups], data, TASKS)


def tables_over_ranks() -> list[RewardTable]:
    """The table of every split, on the ranks that take part."""
    tables = []
    pair = dist.new_group([0, 1])
    for handle, splits in ((pair, SPLITS[2]), (dist.group.WORLD, SPLITS[3])):
        if handle is not dist.GroupMember.NON_GROUP_MEMBER:
            data = Group(dist.get_rank(handle), dist.get_world_size(handle), handle)
            tables += [table_of(split[data.rank], data) for split in splits]
    return tables


def test_the_table_is_the_same_for_every_split() -> None:
    whole = table_of(list(LENGTHS), Group.single())
    everywhere = run_ranks(tables_over_ranks, 3)
    assert [len(tables) for tables in everywhere] == [5, 5, 2]
    for table in (table for tables in everywhere for table in tables):
        for name in ("position", "rollout", "task", "total", "components", "length"):
            mine, theirs = getattr(whole, name), getattr(table, name)
            assert mine.dtype == theirs.dtype
            assert mine.tobytes() == theirs.tobytes(), name
        assert (table.task_names, table.component_names) == (whole.task_names, whole.component_names)


def test_rows_are_ordered_and_hold_what_the_rewards_say() -> None:
    table = table_of(list(LENGTHS), Group.single())
    rows = [(position, number) for position in sorted(LENGTHS) for number in range(len(LENGTHS[position]))]
    assert list(zip(table.position.tolist(), table.rollout.tolist(), strict=True)) == rows
    assert table.length.tolist() == [LENGTHS[position][number] for position, number in rows]
    assert table.task.tolist() == [position % 2 for position, _ in rows]
    assert table.component_names == ("accuracy", "only count", "only read")
    for row, (position, number) in enumerate(rows):
        (group,) = groups_at([position])
        expected = reward(group)[number]
        if (position, number) == (11, 1):
            assert np.isnan(table.total[row])
            assert np.isnan(table.components[row]).all()
        else:
            assert table.total[row] == expected.total
            values = [expected.components.get(name, math.nan) for name in table.component_names]
            np.testing.assert_array_equal(table.components[row], values)


def test_no_rewards_anywhere_is_an_empty_table() -> None:
    table = gather_table([], [], Group.single(), TASKS)
    assert len(table.position) == 0
    assert table.components.shape == (0, 0)


def score_on_replica() -> tuple[list[int], list[Rewards]]:
    """(positions that this rank's verifier saw, the rewards it ends up with)."""
    seen: list[int] = []

    def counting(group: RolloutGroup) -> Rewards:
        seen.append(group.prompt.sample.position)
        return reward(group)

    replica = Group(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    groups = groups_at(list(LENGTHS))
    rewards = score_groups(groups, counting, replica)
    assert gather_objects(len(score_groups(groups[:1], reward, replica)), replica) == [1] * replica.size
    return seen, rewards


def test_a_replica_calls_the_verifier_once_for_each_group() -> None:
    ranks = run_ranks(score_on_replica, 2)
    calls = Counter(position for seen, _ in ranks for position in seen)
    assert calls == dict.fromkeys(LENGTHS, 1)
    assert all(len(seen) in (2, 3) for seen, _ in ranks)
    expected = [reward(group) for group in groups_at(list(LENGTHS))]
    for _, rewards in ranks:
        assert repr(rewards) == repr(expected)  # NaN is not equal to itself, its text is
