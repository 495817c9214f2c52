"""Groups -> rewards, shared out over a replica; rewards of all data ranks -> one table, the same bits on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from megatron_vlrl.errors import DataError
from megatron_vlrl.parallel.collectives import gather_objects, gather_rows
from megatron_vlrl.parallel.groups import Group
from megatron_vlrl.types import RewardBreakdown, RewardTable, RolloutGroup, Sample, ScoredGroup

_FIXED = 6  # columns before the components: position, rollout, task, peers, total, length


def score_groups(
    groups: Sequence[RolloutGroup],
    reward: Callable[[RolloutGroup], tuple[RewardBreakdown, ...]],
    replica: Group,
) -> list[ScoredGroup]:
    """Each group with its rewards. The ranks of a model replica hold the same groups: each scores a strided share, so
    that a verifier runs once for a response and every rank sees the same verdict."""
    shares = gather_objects([reward(group) for group in groups[replica.rank :: replica.size]], replica)
    return [
        ScoredGroup(group=group, rewards=shares[index % replica.size][index // replica.size])
        for index, group in enumerate(groups)
    ]


def gather_table(
    scored: Sequence[ScoredGroup], data: Group, task_names: Sequence[str], *, task_key: str = ""
) -> RewardTable:
    """One table over the data-parallel ranks, ordered by (position, rollout); counts may differ or be 0.

    task_key: the metadata field by which rows are ranked together; "" for the task. Raises DataError, on every rank,
    where a sample has no such field.
    """
    samples = [one.group.prompt.sample for one in scored]
    # Told to every rank before any raises: one that raised alone would leave the others waiting.
    fault = next((_missing(sample, task_key) for sample in samples if task_key and task_key not in sample.meta), None)
    peers = [str(sample.meta.get(task_key)) if task_key else sample.task for sample in samples]
    mine = {name for one in scored for reward in one.rewards for name in reward.components}
    names, labels, faults = zip(*gather_objects((mine, set(peers), fault), data), strict=True)
    if any(faults):
        raise DataError(next(filter(None, faults)))
    components, label = sorted(set().union(*names)), sorted(set().union(*labels))
    rows = [
        row
        for one, peer in zip(scored, peers, strict=True)
        for row in _rows(one, list(task_names).index(one.group.prompt.sample.task), label.index(peer), components)
    ]
    table = gather_rows(np.array(rows, dtype=np.float64).reshape(-1, _FIXED + 2 * len(components)), data)
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    position, rollout, task, peer = table[:, :4].astype(np.int64).T
    values, weights = np.split(table[:, _FIXED:], 2, axis=1)
    return RewardTable(
        position=position,
        rollout=rollout,
        task=task,
        total=table[:, 4],
        components=values,
        weights=weights,
        length=table[:, 5].astype(np.int64),
        peers=np.array(label, dtype=np.str_)[peer],
        task_names=tuple(task_names),
        component_names=tuple(components),
    )


def _rows(one: ScoredGroup, task: int, peer: int, components: Sequence[str]) -> list[list[float]]:
    """A row for each rollout of a group."""
    position = one.position
    return [
        [
            *(position, number, task, peer, reward.total, len(rollout.token_ids)),
            *(reward.components.get(name, math.nan) for name in components),
            *(reward.weights.get(name, 0.0) if name in reward.components else 0.0 for name in components),
        ]
        for number, (rollout, reward) in enumerate(zip(one.group.rollouts, one.rewards, strict=True))
    ]


def _missing(sample: Sample, key: str) -> str:
    return (
        f"algorithm.advantage.task_key is {key!r}, but sample {sample.key!r} has no such metadata field; "
        f"it has {sorted(sample.meta)}"
    )
