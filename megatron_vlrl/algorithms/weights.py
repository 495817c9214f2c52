"""Lengths of responses in, the weight of each one's tokens in the loss out; the denominators are global."""

from __future__ import annotations

import numpy as np

from megatron_vlrl.algorithms.columns import Bools, Floats, Ints
from megatron_vlrl.config.names import unknown_name

AGGREGATIONS = ("sequence_mean", "token_mean", "constant")


def token_weights(
    lengths: Ints, active: Bools, aggregation: str, *, responses: int, tokens: int, constant: int | None = None
) -> Floats:
    """The weight of every token of response m, float64[M]; 0 where it is not active.

    lengths: int64[M] tokens, each at least 1. active: bool[M], which responses train. responses, tokens: how many
    count in the whole global batch, and their tokens; where these are the active ones, the weights of all shards sum
    to 1. `sequence_mean` averages a response's tokens, then the responses; `token_mean` averages all tokens alike;
    `constant` divides by responses * constant (Dr. GRPO, arXiv 2503.20783: a token weighs the same in a short and
    in a long response), where constant is the greatest length that a response may have.
    Raises ConfigError for another aggregation, ValueError for an empty response or denominators of 0.
    """
    if aggregation not in AGGREGATIONS:
        raise unknown_name(aggregation, AGGREGATIONS, "algorithm.loss.aggregation")
    if (lengths < 1).any():
        raise ValueError(f"response {int(np.argmax(lengths < 1))} has no tokens")
    if not active.any():
        return np.zeros(len(lengths))
    if min(responses, tokens) < 1:
        raise ValueError(f"responses={responses} and tokens={tokens} do not count this shard's active ones")
    if aggregation == "constant" and (constant is None or constant < 1):
        raise ValueError(f"aggregation 'constant' with constant={constant}; give the greatest length of a response")
    by_response = lengths if aggregation == "sequence_mean" else np.full_like(lengths, constant or 1)
    divisors = np.full_like(lengths, tokens) if aggregation == "token_mean" else responses * by_response
    return np.where(active, 1.0 / divisors, 0.0)
