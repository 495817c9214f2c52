"""Lengths of responses in, the weight of each one's tokens in the loss out; the denominators are global."""

from __future__ import annotations

import numpy as np

from megatron_vlrl.algorithms.columns import Bools, Floats, Ints
from megatron_vlrl.config.names import unknown_name

AGGREGATIONS = ("sequence_mean", "token_mean")


def token_weights(lengths: Ints, active: Bools, aggregation: str, *, responses: int, tokens: int) -> Floats:
    """The weight of every token of response m, float64[M]; 0 where it is not active.

    lengths: int64[M] tokens, each at least 1. active: bool[M], which responses train. responses, tokens: how many
    active ones there are, and their tokens, in the whole global batch: so the weights of all shards sum to 1.
    `sequence_mean` averages a response's tokens, then the responses; `token_mean` averages all tokens alike.
    Raises ConfigError for another aggregation, ValueError for an empty response or denominators of 0.
    """
    if aggregation not in AGGREGATIONS:
        raise unknown_name(aggregation, AGGREGATIONS, "algorithm.loss.aggregation")
    if (lengths < 1).any():
        raise ValueError(f"response {int(np.argmax(lengths < 1))} has no tokens")
    if active.any() and min(responses, tokens) < 1:
        raise ValueError(f"responses={responses} and tokens={tokens} do not count this shard's active ones")
    each = 1.0 / (max(responses, 1) * lengths) if aggregation == "sequence_mean" else 1.0 / max(tokens, 1)
    return np.where(active, each, 0.0)
