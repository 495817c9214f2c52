"""Which groups train in which update, and their weights: from the global table alone, whatever rank holds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from megatron_vlrl.train.minibatches import Minibatch, assign, filler, make_minibatches, rows_of, trains
from megatron_vlrl.types import AdvantageResult, RewardTable, RolloutGroup
from tests.groups import make_group

TASKS = ("count", "read", "rare")
# position -> (task, response lengths, advantages)
GROUPS = {
    3: (0, [3, 1], [1.0, -1.0]),
    4: (1, [2, 2, 5], [0.5, 0.0, -0.5]),
    6: (0, [4, 4], [0.0, 0.0]),  # uniform
    9: (0, [1], [0.25]),
    12: (2, [6, 2], [-1.0, 1.0]),
    13: (0, [2, 3], [2.0, -2.0]),
    17: (1, [7, 1], [1.0, -1.0]),
    20: (0, [5, 5], [1.5, -1.5]),
}
DROPPED = (4, 1)  # its middle response has no reward


def group_at(position: int) -> RolloutGroup:
    task, lengths, _ = GROUPS[position]
    return make_group(position, lengths, task=TASKS[task])


def table_and_advantages() -> tuple[RewardTable, AdvantageResult]:
    rows = [
        (position, number, task, length, advantage)
        for position, (task, lengths, advantages) in GROUPS.items()
        for number, (length, advantage) in enumerate(zip(lengths, advantages, strict=True))
    ]
    position, rollout, task, length, advantage = (np.array(column) for column in zip(*rows, strict=True))
    table = RewardTable(
        position=position,
        rollout=rollout,
        task=task,
        total=np.zeros(len(rows)),
        components=np.zeros((len(rows), 0)),
        weights=np.zeros((len(rows), 0)),
        length=length,
        peers=np.array(TASKS)[task],
        task_names=TASKS,
        component_names=(),
    )
    no = np.zeros(len(rows), dtype=bool)
    dropped = (position == DROPPED[0]) & (rollout == DROPPED[1])
    return table, AdvantageResult(values=advantage.astype(float), uniform=no, tied=no, dropped=dropped)


def minibatches_of(
    positions: Sequence[int], *, count: int = 2, every_token: bool = False, aggregation: str = "sequence_mean"
) -> list[Minibatch]:
    """Those of a rank that holds `positions`."""
    table, result = table_and_advantages()
    moving = trains(table, result, every_token=every_token)
    moved = set(table.position[moving].tolist())
    return make_minibatches(
        [group_at(position) for position in positions if position in moved],
        table,
        result,
        moving=moving,
        chosen=assign(table, moving, count, (7, 1)),
        aggregation=aggregation,
        constant=10,
    )


def test_rows_of_a_group() -> None:
    table, _ = table_and_advantages()
    for position, (_, lengths, _) in GROUPS.items():
        rows = rows_of(table, group_at(position))
        assert set(table.position[rows].tolist()) == {position}
        assert table.length[rows].tolist() == lengths


def test_a_uniform_group_trains_only_where_every_token_counts() -> None:
    table, result = table_and_advantages()
    moving = trains(table, result, every_token=False)
    # Whole groups: the response of advantage 0 in a group that moves stays.
    assert moving.tolist() == (table.position != 6).tolist()
    assert trains(table, result, every_token=True).all()
    still = AdvantageResult(
        values=np.zeros_like(result.values), uniform=result.uniform, tied=result.tied, dropped=result.dropped
    )
    assert not trains(table, still, every_token=False).any()


def many_groups() -> RewardTable:
    """40, 17 and 3 groups of two rollouts."""
    task = np.repeat(np.repeat([0, 1, 2], [40, 17, 3]), 2)
    n = len(task)
    return RewardTable(
        position=np.repeat(np.arange(60) * 5, 2),
        rollout=np.tile([0, 1], 60),
        task=task,
        total=np.zeros(n),
        components=np.zeros((n, 0)),
        weights=np.zeros((n, 0)),
        length=np.ones(n, dtype=np.int64),
        peers=np.array(TASKS)[task],
        task_names=TASKS,
        component_names=(),
    )


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_each_task_is_dealt_out_evenly(count: int) -> None:
    table = many_groups()
    rows = np.ones(120, dtype=bool)
    chosen = assign(table, rows, count, (0, 0))
    assert sorted(chosen) == np.unique(table.position).tolist()
    for task in range(3):
        positions = set(table.position[table.task == task].tolist())
        dealt = Counter(minibatch for position, minibatch in chosen.items() if position in positions)
        sizes = [dealt[number] for number in range(count)]
        assert max(sizes) - min(sizes) <= 1


def without_small_tasks(deal: dict[int, int]) -> dict[int, int]:
    return {position: number for position, number in deal.items() if position < 200}


def test_the_deal_depends_on_the_key_alone() -> None:
    table, rows = many_groups(), np.ones(120, dtype=bool)
    deals = [assign(table, rows, 4, key) for key in ((0, 0), (0, 1), (1, 0))]
    assert deals[0] == assign(table, rows, 4, (0, 0))
    assert deals[0] != deals[1] != deals[2] != deals[0]
    # Not the same company in another minibatch: who is together changes too.
    together = [
        {frozenset(position for position, number in deal.items() if number == one) for one in range(4)}
        for deal in (without_small_tasks(deal) for deal in deals)
    ]
    assert together[0] != together[1]
    # Small tasks do not always begin with the first minibatch.
    rare = set(range(285, 300, 5))
    first = {min(assign(table, rows, 7, (0, step))[position] for position in rare) for step in range(20)}
    assert len(first) > 1


def test_those_that_move_are_dealt_before_the_others() -> None:
    """So that no update is left with groups that teach nothing."""
    table = many_groups()
    moving = np.isin(table.position, table.position[table.task == 0][:16])  # 8 groups of the first task
    for step in range(5):
        chosen = assign(table, moving, 4, (0, step))
        dealt = Counter(chosen[position] for position in np.unique(table.position[moving]).tolist())
        assert sorted(dealt.values()) == [2, 2, 2, 2]
        assert set(chosen) == set(table.position.tolist())


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
@pytest.mark.parametrize("split", [[list(GROUPS)], [[20, 3, 6, 12], [17, 9], [], [13, 4]]])
def test_weights_of_a_minibatch_sum_to_one_over_all_ranks(split: list[list[int]], aggregation: str) -> None:
    """Where every token counts; else what uniform groups would have is missing from the sum."""
    ranks = [minibatches_of(positions, every_token=True, aggregation=aggregation) for positions in split]
    whole = minibatches_of(list(GROUPS), every_token=True, aggregation=aggregation)
    seen = []
    for parts, total in zip(zip(*ranks, strict=True), whole, strict=True):
        members = [member for part in parts for member in part.groups]
        shares = [
            float(member.weights[number]) * (10 if aggregation == "constant" else len(rollout.token_ids))
            for member in members
            for number, rollout in enumerate(member.group.rollouts)
        ]
        assert sum(shares) == pytest.approx(1.0, rel=1e-12)
        assert {part.trained for part in parts} == {total.trained}
        theirs = {member.group.prompt.sample.position: member for member in total.groups}
        for member in members:
            position = member.group.prompt.sample.position
            seen.append(position)
            assert member.weights.tolist() == theirs[position].weights.tolist()
            task, _, advantages = GROUPS[position]
            assert (member.task, member.advantages.tolist()) == (task, advantages)
    assert sorted(seen) == sorted(GROUPS)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
@pytest.mark.parametrize("every_token", [False, True])
def test_weights_are_the_shares_of_the_global_minibatch(every_token: bool, aggregation: str) -> None:
    """A uniform group is in the denominators whether it is computed or not: leaving it out changes no result."""
    (minibatch,) = minibatches_of(list(GROUPS), count=1, every_token=every_token, aggregation=aggregation)
    counted = [
        (position, number, length)
        for position, (_, lengths, _) in GROUPS.items()
        for number, length in enumerate(lengths)
        if (position, number) != DROPPED
    ]
    tokens = sum(length for _, _, length in counted)
    share = {
        "sequence_mean": lambda length: 1 / (len(counted) * length),
        "token_mean": lambda length: 1 / tokens,
        "constant": lambda length: 1 / (len(counted) * 10),
    }[aggregation]
    shares = {(position, number): share(length) for position, number, length in counted}
    assert [m.group.prompt.sample.position for m in minibatch.groups] == [p for p in GROUPS if every_token or p != 6]
    assert minibatch.trained == len(counted) - (0 if every_token else 2)
    for member in minibatch.groups:
        for number, weight in enumerate(member.weights.tolist()):
            position = member.group.prompt.sample.position
            assert weight == pytest.approx(shares.get((position, number), 0.0), rel=1e-12, abs=0)


def test_no_groups_at_all_is_no_minibatch() -> None:
    table, result = table_and_advantages()
    none = np.zeros(len(table.position), dtype=bool)
    assert make_minibatches([], table, result, moving=none, chosen={}, aggregation="token_mean", constant=1) == []


def test_a_minibatch_of_which_nothing_moves_says_so() -> None:
    table, result = table_and_advantages()
    failed = AdvantageResult(
        values=result.values, uniform=result.uniform, tied=result.tied, dropped=table.position == 9
    )
    moving = np.isin(table.position, [3, 9])
    first, second, third = make_minibatches(
        [group_at(3), group_at(9)],
        table,
        failed,
        moving=moving,
        chosen={9: 0, 3: 1, 6: 2},
        aggregation="token_mean",
        constant=1,
    )
    assert (first.trained, second.trained, third.trained) == (0, 2, 0)
    assert first.groups[0].weights.tolist() == [0.0]


def test_a_filler_has_no_effect_on_any_sum() -> None:
    member = filler()
    assert not member.counted
    assert member.weights.tolist() == member.advantages.tolist() == [0.0]
