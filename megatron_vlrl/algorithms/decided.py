"""Which component of the reward decides the ranks: ranks see order, not size, so a small shaping term may rule them."""

from __future__ import annotations

import numpy as np

from megatron_vlrl.algorithms.blocks import ascending, sort_blocks
from megatron_vlrl.algorithms.columns import Floats, Ints

TIE = 1e-9  # totals this close share a rank


def deciding_component(totals: Floats, components: Floats, weights: Floats, groups: Ints) -> Ints:
    """int64[N]: for each rollout the component that lifts it above its neighbour below in its group; else -1.

    That is the component whose weighted difference between the two is greatest. -1: the lowest of its group, a tie
    with the neighbour, or a failed reward. totals: float64[N], NaN where failed. components, weights: float64[N, K],
    NaN where a rollout has no such component, which counts as 0.
    """
    decided = np.full(len(totals), -1, dtype=np.int64)
    if not components.shape[1]:
        return decided
    blocks = sort_blocks(totals, groups, ascending(totals, np.isfinite(totals)))
    above = blocks.fresh(TIE)
    above[blocks.starts] = False
    rows = np.flatnonzero(above)
    parts = (np.nan_to_num(components) * weights)[blocks.order]
    decided[blocks.order[rows]] = np.argmax(parts[rows] - parts[rows - 1], axis=1)
    return decided
