"""Groups -> rewards, shared out over a replica; rewards of all data ranks -> one table, the same bits on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from megatron_vlrl.parallel.collectives import gather_objects, gather_rows
from megatron_vlrl.parallel.groups import Group
from megatron_vlrl.types import RewardBreakdown, RewardTable, RolloutGroup

Rewards = tuple[RewardBreakdown, ...]
_FIXED = 5  # columns before the components: position, rollout, task, total, length


def score_groups(
    groups: Sequence[RolloutGroup], reward: Callable[[RolloutGroup], Rewards], replica: Group
) -> list[Rewards]:
    """The rewards of each group. The ranks of a model replica hold the same groups: each scores a strided share, so
    that a verifier runs once for a response and every rank sees the same verdict."""
    shares = gather_objects([reward(group) for group in groups[replica.rank :: replica.size]], replica)
    return [shares[index % replica.size][index // replica.size] for index in range(len(groups))]


def gather_table(
    groups: Sequence[RolloutGroup], rewards: Sequence[Rewards], data: Group, task_names: Sequence[str]
) -> RewardTable:
    """One table over the data-parallel ranks, ordered by (position, rollout); counts may differ or be 0."""
    mine = {name for group_rewards in rewards for reward in group_rewards for name in reward.components}
    components = sorted(set().union(*gather_objects(mine, data)))
    task_number = {name: number for number, name in enumerate(task_names)}
    rows = [
        [
            group.prompt.sample.position,
            number,
            task_number[group.prompt.sample.task],
            reward.total,
            len(rollout.token_ids),
            *(reward.components.get(name, math.nan) for name in components),
        ]
        for group, group_rewards in zip(groups, rewards, strict=True)
        for number, (rollout, reward) in enumerate(zip(group.rollouts, group_rewards, strict=True))
    ]
    table = gather_rows(np.array(rows, dtype=np.float64).reshape(-1, _FIXED + len(components)), data)
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    return RewardTable(
        position=table[:, 0].astype(np.int64),
        rollout=table[:, 1].astype(np.int64),
        task=table[:, 2].astype(np.int64),
        total=table[:, 3],
        length=table[:, 4].astype(np.int64),
        components=table[:, _FIXED:],
        task_names=tuple(task_names),
        component_names=tuple(components),
    )
