"""Groups between rollouts and training: nothing lost, nothing doubled, the oldest first, rounds within their budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlrl.config.schema import FilterConfig
from megatron_vlrl.parallel.groups import Group
from megatron_vlrl.rollout.buffer import GroupBuffer, Intake
from megatron_vlrl.train.rewards import gather_table
from megatron_vlrl.types import RewardBreakdown, RewardTable, ScoredGroup
from tests.groups import make_group


def scored(position: int, accuracies: Sequence[float]) -> ScoredGroup:
    """A group whose responses have these accuracies; NaN: the verifier failed."""
    rewards = tuple(
        RewardBreakdown(components={} if math.isnan(a) else {"accuracy": a}, weights={"accuracy": 1.0}, total=a)
        for a in accuracies
    )
    return ScoredGroup(group=make_group(position, [1] * len(accuracies)), rewards=rewards)


MIXED, RIGHT, WRONG = [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]


def round_of(*groups: ScoredGroup) -> tuple[list[ScoredGroup], RewardTable]:
    return list(groups), gather_table(groups, Group.single(), ("count",))


def positions(groups: Sequence[ScoredGroup]) -> list[int]:
    return [one.position for one in groups]


def test_without_filtering_a_step_is_one_round_of_all_that_could_be_drawn() -> None:
    buffer = GroupBuffer()
    intake = Intake(buffer, FilterConfig(), wanted=4)
    assert intake.missing() == 4
    intake.add(*round_of(scored(0, RIGHT), scored(1, MIXED), scored(3, WRONG)))  # one sample could not be read
    assert intake.missing() == 0
    assert positions(buffer.take(4)) == [0, 1, 3]
    assert intake.scalars() == {}


def test_refill_until_the_step_is_full_and_the_surplus_waits() -> None:
    buffer = GroupBuffer()
    intake = Intake(buffer, FilterConfig(rule="std", refill_rounds=4), wanted=3)
    assert intake.missing() == 3
    intake.add(*round_of(scored(0, RIGHT), scored(1, MIXED), scored(2, WRONG)))
    assert intake.missing() == 3
    intake.add(*round_of(scored(3, MIXED), scored(4, MIXED), scored(5, MIXED)))
    assert intake.missing() == 0
    assert positions(buffer.take(3)) == [1, 3, 4]
    assert intake.scalars() == {
        "filter/drawn": 6,
        "filter/kept": 4,
        "filter/right": 1,
        "filter/wrong": 1,
        "filter/neither": 0,
        "filter/carried": 0,
        "filter/rounds": 2,
        "filter/short": 0,
    }
    later = Intake(buffer, FilterConfig(rule="std"), wanted=3)
    assert later.missing() == 2  # one waits
    later.add(*round_of(scored(6, MIXED), scored(7, MIXED)))
    assert positions(buffer.take(3)) == [5, 6, 7]
    assert later.scalars()["filter/carried"] == 1


def test_the_budget_of_rounds_ends_the_refill() -> None:
    buffer = GroupBuffer()
    intake = Intake(buffer, FilterConfig(rule="std", refill_rounds=1), wanted=2)
    for first in (0, 2):
        assert intake.missing() == 2
        intake.add(*round_of(scored(first, RIGHT), scored(first + 1, [math.nan, math.nan])))
    assert intake.missing() == 0
    assert buffer.take(2) == []
    assert intake.scalars()["filter/short"] == 2
    assert intake.scalars()["filter/neither"] == 2


def test_enough_that_waits_needs_no_round() -> None:
    buffer = GroupBuffer()
    groups, _ = round_of(scored(0, MIXED), scored(1, MIXED), scored(2, MIXED))
    buffer.add(groups, [0, 1, 2])
    intake = Intake(buffer, FilterConfig(rule="std"), wanted=2)
    assert intake.missing() == 0
    assert positions(buffer.take(2)) == [0, 1]
    assert intake.scalars()["filter/rounds"] == 0
    assert len(buffer) == 1


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), max_size=40), st.integers(1, 5), st.integers(1, 3))
def test_nothing_is_lost_or_doubled_over_ranks(drawn: list[tuple[bool, int]], wanted: int, ranks: int) -> None:
    """drawn: for each position, whether it is informative, and on which rank it is."""
    buffers = [GroupBuffer() for _ in range(ranks)]
    kept = [position for position, (informative, _) in enumerate(drawn) if informative]
    for start in range(0, len(drawn), 7):
        chunk = range(start, min(start + 7, len(drawn)))
        for rank, buffer in enumerate(buffers):
            own = [scored(position, MIXED) for position in chunk if drawn[position][1] % ranks == rank]
            buffer.add(own, [position for position in chunk if drawn[position][0]])
    taken: list[int] = []
    while len(buffers[0]):
        parts = [positions(buffer.take(wanted)) for buffer in buffers]
        assert all(part == sorted(part) for part in parts)
        step = sorted(position for part in parts for position in part)
        assert len(step) == wanted or not len(buffers[0])
        assert {len(buffer) for buffer in buffers} == {len(buffers[0])}
        taken += step
    assert taken == kept
    assert all(buffer.own == () for buffer in buffers)
    assert np.all(np.diff(taken) > 0)
