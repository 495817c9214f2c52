"""The same weight for every response: supervised learning, in which rewards only report."""

from __future__ import annotations

import numpy as np

from megatron_vlrl.algorithms.columns import RewardColumns
from megatron_vlrl.algorithms.groups import blank_result
from megatron_vlrl.types import AdvantageResult


def ones(columns: RewardColumns) -> AdvantageResult:
    """1 for each rollout, whatever its reward, even one that failed."""
    result = blank_result(np.zeros(len(columns.rewards), dtype=np.bool_))
    result.values[:] = 1.0
    return result
