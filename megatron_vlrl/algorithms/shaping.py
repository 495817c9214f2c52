"""Entropy shaping: each task's mean entropy and its band in, the weight of every token's entropy out.

The term is lambda * sum over tasks of max(0, H - max) + max(0, min - H), H the mean over the task's tokens of the
whole global batch (OpenVLThinkerV2, eq. 10). On which side of its band a task lies is settled once, from sums over all
shards; then lambda * sum over tasks of side * sum(h) / count is linear in the tokens' entropies h. So it adds up
over microbatches, ranks and pipeline stages, and its gradient is that of the hinges.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_vlrl.errors import ConfigError


def entropy_sides(
    sums: Mapping[str, float], counts: Mapping[str, float], bands: Mapping[str, tuple[float, float]]
) -> dict[str, int]:
    """Where each task's mean entropy lies: +1 above its band, -1 below, 0 inside, without tokens, or without a band.

    sums: of the tokens' entropies in nats; counts: tokens; both over the global batch. bands: (min, max) in nats.
    Raises ConfigError for a band with min over max.
    """
    return {task: _side(sums[task], counts[task], *bands[task]) if task in bands else 0 for task in sums}


def entropy_weights(sides: Mapping[str, int], counts: Mapping[str, float], coefficient: float) -> dict[str, float]:
    """What each token's entropy is multiplied by in the loss: coefficient * side / count, by task.

    Summed over all tokens of the global batch that is the shaping term, but for a constant. A task without tokens
    has weight 0.
    """
    return {task: coefficient * side / counts[task] if counts[task] else 0.0 for task, side in sides.items()}


def _side(total: float, count: float, low: float, high: float) -> int:
    if not low <= high:
        raise ConfigError(f"entropy band ({low}, {high}) is out of order; give min <= max, in nats")
    if not count:
        return 0
    mean = total / count
    return int(mean > high) - int(mean < low)
