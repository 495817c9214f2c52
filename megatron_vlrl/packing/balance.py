"""Which rank computes a group, and which groups share a microbatch: pure functions over what groups cost.

In: groups, or columns of their costs in the order of the global table. Out: ranks, or runs of indices; the same on
every rank that is given the same numbers. The work of a group is known before it is done, as its answers are written.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_vlrl.types import RolloutGroup

Costs = NDArray[np.float64]
Ranks = NDArray[np.int64]
THRESHOLD = 0.05  # of the greatest rank's cost: groups, with their pixels, do not move for less


def packed_tokens(group: RolloutGroup) -> int:
    """Tokens that a group takes in a packed row: its prompt once, and every response."""
    return len(group.prompt.token_ids) + sum(len(rollout.token_ids) for rollout in group.rollouts)


def loads(costs: Costs, owners: Ranks, ranks: int) -> Costs:
    """What each rank has to do, float64[ranks]."""
    return np.bincount(owners, costs, ranks).astype(np.float64, copy=False)


def longest_first(costs: Costs, owners: Ranks, start: Costs) -> Ranks:
    """Give out the groups, dearest first, each to the rank that has least; `start` is what ranks have already.

    From nothing, the greatest load is at most 4/3 of the best one possible (Graham 1969). Of equal ranks the present
    owner is taken, else the first.
    """
    filled, result = start.copy(), owners.copy()
    for index in np.argsort(-costs, kind="stable").tolist():
        rank = owners[index]
        if filled[rank] > filled.min():
            rank = filled.argmin()
        result[index] = rank
        filled[rank] += costs[index]
    return result


def rebalance(costs: Costs, owners: Ranks, ranks: int, threshold: float = THRESHOLD) -> Ranks:
    """The rank of each group: int64[n], from its cost and its present rank.

    As long as `longest_first` from nothing would not make the slowest rank faster by more than `threshold`, all stay.
    Then groups stay where they fit under its greatest load, and only the others move; where that turns out worse than
    it by more than `threshold`, its own answer is taken. So what moves always helps.
    """
    fresh = longest_first(costs, owners, np.zeros(ranks))
    goal = loads(costs, fresh, ranks).max()
    if loads(costs, owners, ranks).max() <= goal * (1 + threshold):
        return owners
    filled, stays = np.zeros(ranks), np.zeros(len(costs), dtype=np.bool_)
    for index in np.argsort(-costs, kind="stable").tolist():
        if filled[owners[index]] + costs[index] <= goal:
            filled[owners[index]] += costs[index]
            stays[index] = True
    result = owners.copy()
    result[~stays] = longest_first(costs[~stays], owners[~stays], filled)
    return result if loads(costs, result, ranks).max() <= goal * (1 + threshold) else fresh


def cut(tokens: Sequence[int], limit: int, costs: Sequence[float]) -> list[list[int]]:
    """Indices of items in runs of at most `limit` tokens and of even cost; an item over the limit stands alone.

    Even runs keep the stages of a pipeline, and ranks that share experts, equally busy. Their number is the least
    that the tokens allow, or the next one with which giving the dearest item to the cheapest run with room succeeds.
    """
    order = sorted(range(len(tokens)), key=lambda index: -costs[index])
    small = [number for number in tokens if number <= limit]
    count = len(tokens) - len(small) - (-sum(small) // limit)
    while (runs := _fill(order, tokens, limit, costs, count)) is None:
        count += 1
    return sorted(sorted(run) for run in runs if run)


def _fill(
    order: Sequence[int], tokens: Sequence[int], limit: int, costs: Sequence[float], count: int
) -> list[list[int]] | None:
    """`count` runs, or None where an item finds no room."""
    runs: list[list[int]] = [[] for _ in range(count)]
    used, filled = [0] * count, [0.0] * count
    for index in order:
        room = [run for run in range(count) if not runs[run] or used[run] + tokens[index] <= limit]
        if not room:
            return None
        run = min(room, key=filled.__getitem__)
        runs[run].append(index)
        used[run] += tokens[index]
        filled[run] += costs[index]
    return runs
