"""Log-ratios of tokens in, counts by bin out, which add up over shards; and quantiles of the ratio from the counts.

Bins are symmetric about 0 and grow by a third: from log-ratios of 1e-7 to 20, so that rounding and real drift are both
resolved. A quantile is that of its bin's outer edge: exact to the bin.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_UP = 10.0 ** np.arange(-7, 1.375, 0.125)
EDGES = np.concatenate([-_UP[::-1], _UP])  # float64[E], ascending; BINS lie between, below and above them
BINS = len(EDGES) + 1


def log_ratio_counts(log_ratios: Tensor, task: Tensor, counted: Tensor, tasks: int) -> Tensor:
    """float64[tasks, BINS]: how many counted tokens of each task fall into each bin. All arguments: [R]."""
    edges = torch.from_numpy(EDGES).to(log_ratios.device)
    place = task * BINS + torch.bucketize(log_ratios.double(), edges)
    counts = torch.bincount(place, weights=counted.double(), minlength=tasks * BINS)
    return counts.reshape(tasks, BINS)


def ratio_quantile(counts: NDArray[np.float64], share: float) -> float:
    """The ratio exp(log-ratio) that `share` of the tokens do not exceed, to the width of its bin; NaN without tokens.

    Of a bin the edge away from 0 is taken: never less of a drift than there was.
    """
    if not counts.sum():
        return float("nan")
    place = int(np.searchsorted(np.cumsum(counts), share * counts.sum()))
    middle = len(EDGES) // 2
    edge = EDGES[min(place, len(EDGES) - 1)] if place > middle else EDGES[max(place - 1, 0)]
    return float(np.exp(0.0 if place == middle else edge))
