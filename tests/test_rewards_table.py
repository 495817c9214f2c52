"""One table of rewards, the same bits for any split over data ranks; a verifier runs once for a response."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch.distributed as dist

from megatron_vlrl.errors import DataError
from megatron_vlrl.parallel.collectives import gather_objects
from megatron_vlrl.parallel.groups import Group
from megatron_vlrl.train.rewards import gather_table, score_groups
from megatron_vlrl.types import RewardBreakdown, RewardFailure, RewardTable, RolloutGroup, ScoredGroup
from tests.groups import make_group
from tests.spawn import run_ranks

Rewards = tuple[RewardBreakdown, ...]
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
                weights={"accuracy": 0.9, f"only {task}": 0.1 + position},
                total=math.nan if failed else position / 3 + number / 11,
                failure=RewardFailure(kind="timeout", message="late") if failed else None,
            )
        )
    return tuple(rewards)


def table_of(positions: Sequence[int], data: Group) -> RewardTable:
    return gather_table(scored_at(positions), data, TASKS)


def scored_at(positions: Sequence[int]) -> list[ScoredGroup]:
    return [ScoredGroup(group=group, rewards=reward(group)) for group in groups_at(positions)]


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
        for name in ("position", "rollout", "task", "total", "components", "weights", "length", "peers"):
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
            assert not table.weights[row].any()
        else:
            assert table.total[row] == expected.total
            values = [expected.components.get(name, math.nan) for name in table.component_names]
            np.testing.assert_array_equal(table.components[row], values)
            weights = [expected.weights.get(name, 0.0) for name in table.component_names]
            assert table.weights[row].tolist() == weights
        assert table.peers[row] == group.prompt.sample.task


def test_no_rewards_anywhere_is_an_empty_table() -> None:
    table = gather_table([], Group.single(), TASKS)
    assert len(table.position) == 0
    assert table.components.shape == (0, 0)


def test_rows_are_ranked_with_those_of_the_same_metadata_field() -> None:
    scored = [with_meta(one, {"domain": f"d{one.position % 3}"}) for one in scored_at(list(LENGTHS))]
    table = gather_table(scored, Group.single(), TASKS, task_key="domain")
    assert table.peers.tolist() == [f"d{position % 3}" for position in table.position.tolist()]
    assert table.task.tolist() == [position % 2 for position in table.position.tolist()]


def with_meta(one: ScoredGroup, meta: dict[str, str]) -> ScoredGroup:
    sample = replace(one.group.prompt.sample, meta=meta)
    return replace(one, group=replace(one.group, prompt=replace(one.group.prompt, sample=sample)))


def missing_on_one_rank() -> str:
    data = Group(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    scored = [with_meta(one, {"domain": "a"} if data.rank else {"source": "b"}) for one in scored_at([7])]
    try:
        gather_table(scored, data, TASKS, task_key="domain")
    except DataError as error:
        return str(error)
    return ""


def test_a_sample_without_the_field_is_named_on_every_rank() -> None:
    first, second = run_ranks(missing_on_one_rank, 2)
    assert first == second
    assert "task_key is 'domain'" in first
    assert "'read-7'" in first
    assert "['source']" in first


def score_on_replica() -> tuple[list[int], list[Rewards]]:
    """(positions that this rank's verifier saw, the rewards it ends up with)."""
    seen: list[int] = []

    def counting(group: RolloutGroup) -> Rewards:
        seen.append(group.prompt.sample.position)
        return reward(group)

    replica = Group(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    groups = groups_at(list(LENGTHS))
    rewards = [one.rewards for one in score_groups(groups, counting, replica)]
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
