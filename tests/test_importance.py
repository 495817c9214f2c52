"""Weights for the difference of sampler and trainer, against their definitions token by token."""

from __future__ import annotations

import math
import typing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vlrl.algorithms.importance import IMPORTANCE
from megatron_vlrl.config.schema import LossConfig

KINDS = sorted(IMPORTANCE)
LENGTHS = (1, 6, 20, 3, 1)
SEQUENCES = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))


def columns(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The trainer's and the sampler's log-probs; responses 0, 1 and 4 differ little, 2 and 3 much."""
    draw = torch.Generator().manual_seed(1)
    rollout = -3 * torch.rand(sum(LENGTHS), generator=draw, dtype=torch.float64)
    spread = torch.tensor([0.3, 0.1, 0.5, 1.0, 0.2], dtype=torch.float64)[SEQUENCES]
    old = rollout + spread * torch.randn(sum(LENGTHS), generator=draw, dtype=torch.float64)
    return old.to(dtype), rollout.to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_token_tis_is_the_truncated_ratio(dtype: torch.dtype, tolerance: float) -> None:
    old, rollout = columns(dtype)
    weights, marks = IMPORTANCE["token_tis"](old, rollout, SEQUENCES, cap=1.5)
    ratios = [math.exp(x - y) for x, y in zip(old.tolist(), rollout.tolist(), strict=True)]
    expected = torch.tensor([min(ratio, 1.5) for ratio in ratios], dtype=dtype)
    torch.testing.assert_close(weights, expected, rtol=tolerance, atol=tolerance)
    assert marks["importance_capped"].tolist() == [float(ratio > 1.5) for ratio in ratios]
    assert 0 < marks["importance_capped"].sum() < len(ratios)


def test_sequence_mask_keeps_whole_responses_close_to_the_sampler() -> None:
    old, rollout = columns()
    weights, marks = IMPORTANCE["sequence_mask"](old, rollout, SEQUENCES, cap=2.0)
    kept = []
    for number in range(len(LENGTHS)):
        members = torch.eq(SEQUENCES, number)
        whole = math.prod(
            math.exp(x - y) for x, y in zip(old[members].tolist(), rollout[members].tolist(), strict=True)
        )
        kept.append(float(1 / 2.0 <= whole <= 2.0))
    assert set(kept) == {0.0, 1.0}
    assert torch.equal(weights, torch.tensor(kept, dtype=torch.float64)[SEQUENCES])
    assert torch.equal(marks["importance"], weights)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sequence_mask_has_two_sides_and_takes_the_sum_of_a_response(sign: float) -> None:
    sequences = torch.tensor([0, 0, 1, 1, 2])
    rollout = torch.zeros(5, dtype=torch.float64)
    old = sign * torch.tensor([0.3, 0.39, 0.3, 0.4, 0.69], dtype=torch.float64)  # log 2 is 0.693
    weights, _ = IMPORTANCE["sequence_mask"](old, rollout, sequences, cap=2.0)
    assert weights.tolist() == [1.0, 1.0, 0.0, 0.0, 1.0]


def test_none_weighs_all_alike() -> None:
    old, rollout = columns()
    weights, marks = IMPORTANCE["none"](old, rollout, SEQUENCES, cap=2.0)
    assert torch.equal(weights, torch.ones_like(old))
    assert marks == {}


@pytest.mark.parametrize("kind", ["token_tis", "sequence_mask"])
def test_equal_policies_weigh_exactly_one(kind: str) -> None:
    old, _ = columns(torch.float32)
    weights, marks = IMPORTANCE[kind](old, old, SEQUENCES, cap=2.0)
    assert torch.equal(weights, torch.ones_like(old))
    assert not marks.get("importance_capped", torch.zeros(1)).any()


def test_tokens_of_the_sampler_weighed_are_tokens_of_the_trainer() -> None:
    """Over a vocabulary: E_sampler[w f] = E_trainer[f] without a cap."""
    draw = torch.Generator().manual_seed(2)
    old, rollout = (torch.log_softmax(torch.randn(6, generator=draw, dtype=torch.float64), 0) for _ in range(2))
    f = torch.randn(6, generator=draw, dtype=torch.float64)
    weights, _ = IMPORTANCE["token_tis"](old, rollout, torch.arange(6), cap=1e6)
    torch.testing.assert_close((rollout.exp() * weights * f).sum(), (old.exp() * f).sum())


LOG_PROBS = st.floats(-1e4, 0.0, width=32)


@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("kind", KINDS)
@given(
    responses=st.lists(st.lists(st.tuples(LOG_PROBS, LOG_PROBS), min_size=1, max_size=5), max_size=5), data=st.data()
)
def test_any_columns_give_bounded_weights_and_parts_equal_the_whole(
    kind: str, responses: list[list[tuple[float, float]]], data: st.DataObject
) -> None:
    lengths = torch.tensor([len(response) for response in responses], dtype=torch.int64)
    old, rollout = torch.tensor([row for response in responses for row in response]).reshape(-1, 2).unbind(1)
    sequences = torch.arange(len(responses)).repeat_interleave(lengths)
    old.requires_grad_()
    weights, marks = IMPORTANCE[kind](old, rollout, sequences, cap=2.0)
    for column in (weights, *marks.values()):
        assert column.shape == old.shape
        assert not column.requires_grad
        assert torch.isfinite(column).all()
    assert ((weights >= 0) & (weights <= 2.0)).all()

    first = data.draw(st.integers(0, len(responses)))
    cut = int(lengths[:first].sum())
    parts = [
        IMPORTANCE[kind](old[part], rollout[part], sequences[part] - number, cap=2.0)[0]
        for part, number in ((slice(cut), 0), (slice(cut, None), first))
    ]
    torch.testing.assert_close(torch.cat(parts), weights)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_never_broadcast(kind: str) -> None:
    with pytest.raises(ValueError, match="unequal shape"):
        IMPORTANCE[kind](torch.zeros(4), torch.zeros(1), torch.zeros(4, dtype=torch.int64), cap=2.0)


def test_the_configuration_knows_every_kind() -> None:
    assert set(typing.get_args(typing.get_type_hints(LossConfig)["importance"])) == set(IMPORTANCE)
