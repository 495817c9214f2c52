"""Weights of tokens: what they average, and that the global denominators make shards add up."""

from __future__ import annotations

import typing

import numpy as np
import pytest

from megatron_vlrl.algorithms.weights import AGGREGATIONS, token_weights
from megatron_vlrl.config.schema import LossConfig
from megatron_vlrl.errors import ConfigError

LENGTHS = np.array([1, 4, 10, 5])
ACTIVE = np.array([True, False, True, True])


def test_sequence_mean_weighs_responses_alike_and_token_mean_tokens() -> None:
    by_response = token_weights(LENGTHS, ACTIVE, "sequence_mean", responses=3, tokens=16)
    np.testing.assert_allclose(by_response * LENGTHS, [1 / 3, 0, 1 / 3, 1 / 3])
    by_token = token_weights(LENGTHS, ACTIVE, "token_mean", responses=3, tokens=16)
    np.testing.assert_allclose(by_token, [1 / 16, 0, 1 / 16, 1 / 16])


def test_constant_weighs_tokens_alike_whatever_the_lengths() -> None:
    weights = token_weights(LENGTHS, ACTIVE, "constant", responses=3, tokens=16, constant=20)
    np.testing.assert_allclose(weights, [1 / 60, 0, 1 / 60, 1 / 60])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_responses_that_do_not_train_count_where_the_caller_says_so(aggregation: str) -> None:
    few, more = (
        token_weights(LENGTHS, ACTIVE, aggregation, responses=count, tokens=count * 5, constant=20) for count in (4, 8)
    )
    np.testing.assert_allclose(more, few / 2)
    assert few[ACTIVE].all()


def test_the_configuration_knows_every_aggregation() -> None:
    assert set(typing.get_args(typing.get_type_hints(LossConfig)["aggregation"])) == set(AGGREGATIONS)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_weights_of_all_shards_sum_to_one(aggregation: str) -> None:
    shards = [slice(0, 2), slice(2, 2), slice(2, 4)]
    weights = [token_weights(LENGTHS[s], ACTIVE[s], aggregation, responses=3, tokens=16) for s in shards]
    assert sum((w * LENGTHS[s]).sum() for w, s in zip(weights, shards, strict=True)) == pytest.approx(1.0)


def test_mistakes_in_weights_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'token_mean'"):
        token_weights(LENGTHS, ACTIVE, "tokens_mean", responses=3, tokens=16)
    with pytest.raises(ValueError, match="response 1 has no tokens"):
        token_weights(np.array([1, 0]), np.array([True, True]), "token_mean", responses=2, tokens=1)
    with pytest.raises(ValueError, match="responses=0"):
        token_weights(LENGTHS, ACTIVE, "sequence_mean", responses=0, tokens=0)
    for constant in (None, 0):
        with pytest.raises(ValueError, match=f"constant={constant}"):
            token_weights(LENGTHS, ACTIVE, "constant", responses=3, tokens=16, constant=constant)
    idle = token_weights(LENGTHS, np.zeros(4, bool), "sequence_mean", responses=0, tokens=0)
    assert idle.tolist() == [0.0] * 4
