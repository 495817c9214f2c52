"""Groups that wait for the next step survive a checkpoint to the bit, at any number of data ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_vlrl.checkpoint.waiting import WAITING_FILE, read_waiting, write_waiting
from megatron_vlrl.errors import CheckpointError
from megatron_vlrl.parallel.groups import Group, ProcessGroups
from megatron_vlrl.types import RewardBreakdown, RewardFailure, RolloutGroup, ScoredGroup
from tests.groups import make_group

LENGTHS = {3: [2, 5], 4: [1], 8: [3, 3, 1], 11: [4]}


def waiting(position: int) -> ScoredGroup:
    random = np.random.default_rng(position)
    group = make_group(position, LENGTHS[position])
    rollouts = tuple(
        replace(
            rollout,
            log_probs=-random.random(len(rollout.token_ids)).astype(np.float32),
            text=f"<answer>{number} ä</answer>",
            finish_reason="length" if number else "stop",
            weight_version=7,
        )
        for number, rollout in enumerate(group.rollouts)
    )
    rewards = tuple(
        RewardBreakdown(components={"format": 1.0}, weights={"format": 0.1}, total=math.nan, failure=FAILURE)
        if number == 1
        else RewardBreakdown(components={"accuracy": 1 / 3}, weights={"accuracy": 0.9}, total=0.3)
        for number in range(len(rollouts))
    )
    return ScoredGroup(group=replace(group, rollouts=rollouts), rewards=rewards)


FAILURE = RewardFailure(kind="timeout", message="late")


def prompt_at(position: int):
    return make_group(position, LENGTHS[position]).prompt


def single() -> ProcessGroups:
    return ProcessGroups.replicas(Group.single())


def same(one: RolloutGroup, other: RolloutGroup) -> bool:
    return repr(one.rollouts) == repr(other.rollouts) and all(
        np.array_equal(a.log_probs, b.log_probs) and a.log_probs.dtype == b.log_probs.dtype
        for a, b in zip(one.rollouts, other.rollouts, strict=True)
    )


@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_waits_comes_back_on_any_number_of_ranks(tmp_path: Path, world: int) -> None:
    groups = [waiting(position) for position in LENGTHS]
    write_waiting(tmp_path, groups, single())
    back: dict[int, ScoredGroup] = {}
    for rank in range(world):
        own, positions = read_waiting(tmp_path, prompt_at, Group(rank, world, None))
        assert positions == list(LENGTHS)
        assert all(one.position % world == rank for one in own)
        back |= {one.position: one for one in own}
    assert sorted(back) == sorted(LENGTHS)
    for group in groups:
        assert same(back[group.position].group, group.group)
        assert repr(back[group.position].rewards) == repr(group.rewards)  # NaN is not equal to itself
        assert back[group.position].group.prompt.token_ids == group.group.prompt.token_ids


def test_nothing_that_waits_is_no_file(tmp_path: Path) -> None:
    write_waiting(tmp_path, [], single())
    assert list(tmp_path.iterdir()) == []
    assert read_waiting(tmp_path, prompt_at, Group.single()) == ([], [])


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    write_waiting(tmp_path, [waiting(3)], single())
    path = tmp_path / WAITING_FILE
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"waiting_groups\.npz is damaged"):
        read_waiting(tmp_path, prompt_at, Group.single())
