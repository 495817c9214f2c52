"""Which groups share a microbatch: pure functions over costs."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vlrl.types import RolloutGroup


def packed_tokens(group: RolloutGroup) -> int:
    """Tokens that a group takes in a packed row: its prompt once, and every response."""
    return len(group.prompt.token_ids) + sum(len(rollout.token_ids) for rollout in group.rollouts)


def cut(costs: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of items cut into runs of at most `limit`, evenly, order kept; an item over the limit stands alone.

    Even runs keep a pipeline's stages equally busy: the number of runs is the least that fits, then
    each run is closed at its share of the total.
    """
    runs: list[list[int]] = []
    least = max(1, -(-sum(costs) // limit))
    share = sum(costs) / least
    done, current, filled = 0, list[int](), 0
    for index, cost in enumerate(costs):
        if current and (filled + cost > limit or done + filled >= share * (len(runs) + 1)):
            runs.append(current)
            done += filled
            current, filled = [], 0
        current.append(index)
        filled += cost
    if current:
        runs.append(current)
    return runs
