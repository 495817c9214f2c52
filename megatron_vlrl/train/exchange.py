"""Groups as the data ranks wrote them -> groups so shared out that the ranks work equally long at each update.

Every rank of a model replica holds the same groups and takes part in its own data group, so a replica stays whole.
Which rank computes a group changes no result: advantages and weights come from the global table by its position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vlrl.packing.balance import loads, rebalance
from megatron_vlrl.parallel.collectives import exchange_objects, gather_rows
from megatron_vlrl.parallel.groups import Group
from megatron_vlrl.types import RolloutGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """This rank's groups, in the order of their positions. before, after: the work of the busiest rank of each update
    over the mean of all ranks, weighted by that mean; 1 when nobody waits, or nothing trains. The same on every rank.
    """

    groups: tuple[RolloutGroup, ...]
    before: float
    after: float

    def scalars(self) -> dict[str, float]:
        """For the step's report."""
        return {"balance/before": self.before, "balance/after": self.after}


def share_out(
    groups: Sequence[RolloutGroup], chosen: Mapping[int, int], cost: Callable[[RolloutGroup], float], data: Group
) -> Shares:
    """Balance each minibatch of `chosen` (position -> minibatch) over the data ranks, which all call this.

    Groups that are not chosen are left out. Only groups whose rank changes travel, from rank to rank.
    """
    own = {group.prompt.sample.position: group for group in groups if group.prompt.sample.position in chosen}
    rows = [[position, data.rank, cost(group)] for position, group in own.items()]
    table = gather_rows(np.array(rows, dtype=np.float64).reshape(-1, 3), data)
    table = table[np.argsort(table[:, 0])]
    positions, before, costs = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2]
    minibatch = np.array([chosen[position] for position in positions.tolist()], dtype=np.int64)
    after, busiest, total = before.copy(), np.zeros(2), 0.0
    for number in range(minibatch.max(initial=-1) + 1):
        inside = minibatch == number
        after[inside] = rebalance(costs[inside], before[inside], data.size)
        work = [loads(costs[inside], owners[inside], data.size) for owners in (before, after)]
        busiest += [of_ranks.max() for of_ranks in work]
        total += float(work[0].sum())
    leaving = {
        position: rank
        for position, now, rank in zip(positions.tolist(), before.tolist(), after.tolist(), strict=True)
        if now == data.rank != rank
    }
    outgoing: dict[int, list[RolloutGroup]] = {}
    for position, rank in leaving.items():
        outgoing.setdefault(rank, []).append(own[position])
    kept = [group for position, group in own.items() if position not in leaving]
    held = [*kept, *exchange_objects(outgoing, data)]
    spread = busiest * data.size / total if total else np.ones(2)
    return Shares(
        groups=tuple(sorted(held, key=lambda group: group.prompt.sample.position)),
        before=float(spread[0]),
        after=float(spread[1]),
    )
