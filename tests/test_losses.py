"""Token losses against the written formula in float64, and the weights that carry the global denominators."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_vlrl.algorithms.losses import LOSSES, nll, ppo_clip
from megatron_vlrl.algorithms.weights import token_weights
from megatron_vlrl.errors import ConfigError

LOW, HIGH = 0.2, 0.28


def _columns(count: int = 64, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(count, generator=g, dtype=torch.float64) * 3
    new = old + 0.4 * torch.randn(count, generator=g, dtype=torch.float64)
    advantages = torch.randn(count, generator=g, dtype=torch.float64)
    advantages[::7] = 0.0
    weights = torch.rand(count, generator=g, dtype=torch.float64) / count
    return [column.to(dtype) for column in (new, old, advantages, weights)]


def _token_by_token(new: list[float], old: list[float], advantage: list[float], weight: list[float]) -> torch.Tensor:
    """The formula of the paper with autograd, one scalar at a time, by cases instead of min and clip."""
    total = torch.zeros((), dtype=torch.float64)
    for x, y, a, w in zip(new, old, advantage, weight, strict=True):
        ratio = torch.exp(x - y)
        if a >= 0:
            value = ratio * a if ratio <= 1 + HIGH else torch.tensor((1 + HIGH) * a, dtype=torch.float64)
        else:
            value = ratio * a if ratio >= 1 - LOW else torch.tensor((1 - LOW) * a, dtype=torch.float64)
        total = total - w * value
    return total


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_ppo_clip_equals_the_written_formula(dtype: torch.dtype, tolerance: float) -> None:
    new, old, advantages, weights = _columns(dtype=dtype)
    log_probs = new.clone().requires_grad_()
    loss, sums = ppo_clip(log_probs, old, advantages, weights, clip_low=LOW, clip_high=HIGH)
    loss.backward()

    exact = new.double().requires_grad_()
    expected = _token_by_token(list(exact), old.tolist(), advantages.tolist(), weights.tolist())
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(log_probs.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)

    ratio = torch.exp(new - old)
    cut = ((advantages > 0) & (ratio > 1 + HIGH)) | ((advantages < 0) & (ratio < 1 - LOW))
    assert 0 < cut.sum() < len(cut)
    assert sums["clip_fraction"] == cut.sum()
    assert torch.equal(log_probs.grad == 0, cut | (advantages == 0))
    torch.testing.assert_close(sums["policy_kl"], (ratio - 1 - (new - old)).sum(), rtol=1e-5, atol=1e-6)


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    _, old, advantages, weights = _columns()
    log_probs = old.clone().requires_grad_()
    loss, sums = ppo_clip(log_probs, old, advantages, weights, clip_low=LOW, clip_high=HIGH)
    loss.backward()
    torch.testing.assert_close(log_probs.grad, -weights * advantages)
    torch.testing.assert_close(loss.detach(), -(weights * advantages).sum())
    assert sums["clip_fraction"] == sums["policy_kl"] == 0


def test_far_log_ratios_stay_finite() -> None:
    log_probs = torch.tensor([-1.0, -500.0, -1.0, -torch.inf, -1.0], requires_grad=True)
    old = torch.tensor([-500.0, -1.0, -500.0, -1.0, -1.0])
    advantages = torch.tensor([1.0, -1.0, -1.0, 0.0, 2.0])
    loss, sums = ppo_clip(log_probs, old, advantages, torch.ones(5), clip_low=LOW, clip_high=HIGH)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(value) for value in sums.values())
    assert log_probs.grad.tolist() == [0.0, 0.0, 0.0, 0.0, -2.0]


def test_nll_looks_at_the_log_probs_alone() -> None:
    new, old, advantages, weights = _columns()
    log_probs = new.clone().requires_grad_()
    loss, sums = nll(log_probs, old, advantages, weights, clip_low=LOW, clip_high=HIGH)
    loss.backward()
    torch.testing.assert_close(log_probs.grad, -weights)
    torch.testing.assert_close(sums["nll"], -new.sum())


@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_parts_add_up_and_reports_carry_no_gradient(kind: str) -> None:
    columns = _columns()
    whole, sums = LOSSES[kind](*columns, clip_low=LOW, clip_high=HIGH)
    parts = [LOSSES[kind](*(c[p] for c in columns), clip_low=LOW, clip_high=HIGH) for p in (slice(9), slice(9, None))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    for name, total in sums.items():
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], total)

    log_probs = columns[0].requires_grad_()
    loss, sums = LOSSES[kind](log_probs, *columns[1:], clip_low=LOW, clip_high=HIGH)
    assert loss.requires_grad
    assert not any(total.requires_grad for total in sums.values())


@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_no_tokens_give_a_loss_of_zero_that_has_a_gradient(kind: str) -> None:
    empty = torch.zeros(0)
    log_probs = torch.zeros(0, requires_grad=True)
    loss, _ = LOSSES[kind](log_probs, empty, empty, empty, clip_low=LOW, clip_high=HIGH)
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_columns_are_never_broadcast(kind: str) -> None:
    with pytest.raises(ValueError, match=r"unequal shape: .*\(4,\).*\(1,\)"):
        LOSSES[kind](torch.zeros(4), torch.zeros(4), torch.zeros(4), torch.zeros(1), clip_low=LOW, clip_high=HIGH)


LENGTHS = np.array([1, 4, 10, 5])
ACTIVE = np.array([True, False, True, True])


def test_sequence_mean_weighs_responses_alike_and_token_mean_tokens() -> None:
    by_response = token_weights(LENGTHS, ACTIVE, "sequence_mean", responses=3, tokens=16)
    np.testing.assert_allclose(by_response * LENGTHS, [1 / 3, 0, 1 / 3, 1 / 3])
    by_token = token_weights(LENGTHS, ACTIVE, "token_mean", responses=3, tokens=16)
    np.testing.assert_allclose(by_token, [1 / 16, 0, 1 / 16, 1 / 16])


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
    idle = token_weights(LENGTHS, np.zeros(4, bool), "sequence_mean", responses=0, tokens=0)
    assert idle.tolist() == [0.0] * 4
