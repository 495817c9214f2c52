"""Dynamic filtering: the accuracies of groups in, which of them can teach anything out (OpenVLThinkerV2 §3.1, DAPO)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_vlrl.algorithms.blocks import ascending, sort_blocks
from megatron_vlrl.algorithms.columns import Bools, Floats, Ints
from megatron_vlrl.config.names import resolve_name

SPREAD = 1e-6  # accuracies of a group this close are all the same
LOW, HIGH = 0.01, 0.99

# (mean, min, max of each group's accuracies, float64[B]) -> which groups are kept, bool[B]
Rule = Callable[[Floats, Floats, Floats], Bools]

FILTERS: dict[str, Rule] = {
    "off": lambda mean, low, high: np.ones(len(mean), dtype=np.bool_),
    "std": lambda mean, low, high: high - low > SPREAD,
    # Keeps a group whose accuracies are all 0.5, as a box's overlap may be.
    "mean_band": lambda mean, low, high: (mean > LOW) & (mean < HIGH),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Filtered:
    """Group ids, ascending int64[B]: those that are kept; and of the others those with only right answers, only wrong
    ones, and neither (no valid accuracy, or all the same in between)."""

    kept: Ints
    right: Ints
    wrong: Ints
    neither: Ints


def filter_groups(accuracy: Floats, groups: Ints, rule: str) -> Filtered:
    """Apply a rule of FILTERS to the groups of N rollouts.

    accuracy: float64[N] in [0, 1], NaN where a verifier failed: such rollouts have no say, and a group of none but
    them is dropped, except with `off`. Raises ConfigError for an unknown rule.
    """
    keep = resolve_name(rule, FILTERS, "algorithm.filter.rule")
    ids = np.unique(groups)
    blocks = sort_blocks(accuracy, groups, ascending(accuracy, np.isfinite(accuracy)))
    judged = groups[blocks.order[blocks.starts]]
    low, high = blocks.values[blocks.starts], blocks.values[blocks.starts + blocks.sizes - 1]
    kept = ids if rule == "off" else judged[keep(blocks.sums(blocks.values) / blocks.sizes, low, high)]
    out = ~np.isin(judged, kept)
    right, wrong = judged[out & (low >= HIGH)], judged[out & (high <= LOW)]
    return Filtered(
        kept=kept, right=right, wrong=wrong, neither=np.setdiff1d(ids, np.concatenate([kept, right, wrong]))
    )
