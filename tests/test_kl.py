"""Estimators of the divergence from a reference: their expectations and those of their gradients, over a vocabulary."""

from __future__ import annotations

import math
import typing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vlrl.algorithms.kl import ESTIMATORS
from megatron_vlrl.config.schema import KLConfig

KINDS = sorted(ESTIMATORS)


def policies(distance: float = 0.3) -> tuple[Tensor, Tensor]:
    """Logits of a policy over 6 words, and the log-probs of a reference `distance` away."""
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(6, generator=draw, dtype=torch.float64)
    reference = torch.log_softmax(logits + distance * torch.randn(6, generator=draw, dtype=torch.float64), 0)
    return logits.requires_grad_(), reference


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probs."""
    return (p.exp() * (p - q)).sum()


def expected_value_and_gradient(kind: str, distance: float = 0.3) -> tuple[float, Tensor]:
    """Over the policy's own words: of the estimate, and of its gradient with respect to the logits."""
    logits, reference = policies(distance)
    log_probs = torch.log_softmax(logits, 0)
    estimates = ESTIMATORS[kind](log_probs, reference)
    share = log_probs.detach().exp()
    (gradient,) = torch.autograd.grad((share * estimates).sum(), logits)
    return (share * estimates).sum().item(), gradient


def gradient_of(loss: Tensor, logits: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kind: str) -> None:
    logits, reference = policies()
    exact = divergence(torch.log_softmax(logits, 0), reference).item()
    assert exact > 0.01
    assert expected_value_and_gradient(kind)[0] == pytest.approx(exact, rel=1e-12)


def test_k2_is_nearly_unbiased_close_to_the_reference() -> None:
    for distance, bias in ((0.3, 0.2), (0.03, 0.02), (0.003, 0.002)):
        logits, reference = policies(distance)
        exact = divergence(torch.log_softmax(logits, 0), reference).item()
        assert expected_value_and_gradient("k2", distance)[0] == pytest.approx(exact, rel=bias)


def test_the_expected_gradients_are_three_different_ones() -> None:
    logits, reference = policies()
    log_probs = torch.log_softmax(logits, 0)
    reverse = gradient_of(divergence(log_probs, reference), logits)
    forward = gradient_of(divergence(reference, torch.log_softmax(logits, 0)), logits)
    assert not torch.allclose(reverse, forward, rtol=1e-2)
    torch.testing.assert_close(expected_value_and_gradient("k1")[1], torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(expected_value_and_gradient("k2")[1], reverse)
    torch.testing.assert_close(expected_value_and_gradient("k3")[1], forward)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_by_hand(kind: str, dtype: torch.dtype) -> None:
    drift = torch.tensor([-2.0, -0.1, 0.0, 0.1, 2.0], dtype=dtype)  # of the policy against the reference
    log_probs = (drift - 3).requires_grad_()
    estimates = ESTIMATORS[kind](log_probs, torch.full_like(drift, -3))
    (gradient,) = torch.autograd.grad(estimates.sum(), log_probs)
    value, slope = {
        "k1": (lambda d: d, lambda d: 1.0),
        "k2": (lambda d: d * d / 2, lambda d: d),
        "k3": (lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
    }[kind]
    for column, by_hand in ((estimates, value), (gradient, slope)):
        expected = torch.tensor([by_hand(d) for d in drift.tolist()], dtype=dtype)
        torch.testing.assert_close(column, expected, rtol=2e-6, atol=5e-7)


LOG_PROBS = st.floats(-1e4, 0.0, width=32)


@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("kind", KINDS)
@given(rows=st.lists(st.tuples(LOG_PROBS, LOG_PROBS), max_size=8))
def test_any_log_probs_give_finite_estimates(kind: str, rows: list[tuple[float, float]]) -> None:
    columns = torch.tensor(rows).reshape(-1, 2)
    log_probs = columns[:, 0].clone().requires_grad_()
    estimates = ESTIMATORS[kind](log_probs, columns[:, 1])
    estimates.sum().backward()
    assert estimates.shape == log_probs.grad.shape == (len(rows),)
    assert torch.isfinite(estimates).all()
    assert torch.isfinite(log_probs.grad).all()
    if kind != "k1":
        assert (estimates >= -1e-6).all()


def test_a_policy_far_above_its_reference_is_still_pulled_back() -> None:
    log_probs = torch.tensor([-1.0], requires_grad=True)
    ESTIMATORS["k3"](log_probs, torch.tensor([-1e4])).sum().backward()
    assert log_probs.grad.tolist() == [1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_never_broadcast(kind: str) -> None:
    with pytest.raises(ValueError, match="unequal shape"):
        ESTIMATORS[kind](torch.zeros(4), torch.zeros(1))


def test_the_configuration_knows_every_estimator() -> None:
    assert set(typing.get_args(typing.get_type_hints(KLConfig)["estimator"])) == set(ESTIMATORS)
