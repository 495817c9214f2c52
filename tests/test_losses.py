"""Token losses against the written formula in float64, and the weights that carry the global denominators."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_vlrl.algorithms.losses import LOSSES, check_loss_options, nll, ppo_clip
from megatron_vlrl.algorithms.weights import token_weights
from megatron_vlrl.errors import ConfigError

LOW, HIGH = 0.2, 0.28
CLIPS = {"clip_low": LOW, "clip_high": HIGH}
OPTIONS = {"ppo_clip": CLIPS, "nll": {}}


def _columns(count: int = 64, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(count, generator=g, dtype=torch.float64) * 3
    new = old + 0.4 * torch.randn(count, generator=g, dtype=torch.float64)
    advantages = torch.randn(count, generator=g, dtype=torch.float64)
    advantages[::7] = 0.0
    weights = torch.rand(count, generator=g, dtype=torch.float64) / count
    return [column.to(dtype) for column in (new, old, advantages, weights)]


def _sequences(count: int = 64) -> torch.Tensor:
    return torch.arange(count) // 9


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
    losses, marks = ppo_clip(log_probs, old, advantages, _sequences(), **CLIPS)
    loss = (weights * losses).sum()
    loss.backward()

    exact = new.double().requires_grad_()
    expected = _token_by_token(list(exact), old.tolist(), advantages.tolist(), weights.tolist())
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(log_probs.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)

    ratio = torch.exp(new - old)
    cut = ((advantages > 0) & (ratio > 1 + HIGH)) | ((advantages < 0) & (ratio < 1 - LOW))
    assert 0 < cut.sum() < len(cut)
    assert torch.equal(marks["clip_fraction"], cut.to(dtype))
    assert torch.equal(log_probs.grad == 0, cut | (advantages == 0))
    torch.testing.assert_close(marks["policy_kl"], ratio - 1 - (new - old), rtol=1e-5, atol=1e-6)


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    _, old, advantages, weights = _columns()
    log_probs = old.clone().requires_grad_()
    losses, marks = ppo_clip(log_probs, old, advantages, _sequences(), **CLIPS)
    loss = (weights * losses).sum()
    loss.backward()
    torch.testing.assert_close(log_probs.grad, -weights * advantages)
    torch.testing.assert_close(loss.detach(), -(weights * advantages).sum())
    assert not marks["clip_fraction"].any()
    assert not marks["policy_kl"].any()


def test_far_log_ratios_stay_finite() -> None:
    log_probs = torch.tensor([-1.0, -500.0, -1.0, -torch.inf, -1.0], requires_grad=True)
    old = torch.tensor([-500.0, -1.0, -500.0, -1.0, -1.0])
    advantages = torch.tensor([1.0, -1.0, -1.0, 0.0, 2.0])
    losses, marks = ppo_clip(log_probs, old, advantages, torch.zeros(5, dtype=torch.int64), **CLIPS)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert all(torch.isfinite(mark).all() for mark in marks.values())
    assert log_probs.grad.tolist() == [0.0, 0.0, 0.0, 0.0, -2.0]


def test_nll_looks_at_the_log_probs_alone() -> None:
    new, old, advantages, weights = _columns()
    log_probs = new.clone().requires_grad_()
    losses, marks = nll(log_probs, old, advantages, _sequences())
    (weights * losses).sum().backward()
    torch.testing.assert_close(log_probs.grad, -weights)
    assert torch.equal(marks["nll"], -new)


@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_parts_equal_the_whole_and_marks_carry_no_gradient(kind: str) -> None:
    columns = [*_columns()[:3], _sequences()]
    columns[0].requires_grad_()
    whole, marks = LOSSES[kind](*columns, **OPTIONS[kind])
    assert whole.requires_grad
    assert not any(mark.requires_grad for mark in marks.values())
    assert all(column.shape == columns[0].shape for column in (whole, *marks.values()))

    cut = 27  # between two responses
    for part in (slice(cut), slice(cut, None)):
        log_probs, old, advantages, sequences = (column[part] for column in columns)
        losses, part_marks = LOSSES[kind](log_probs, old, advantages, sequences - sequences.min(), **OPTIONS[kind])
        torch.testing.assert_close(losses, whole[part])
        torch.testing.assert_close(part_marks, {name: mark[part] for name, mark in marks.items()})


@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_no_tokens_give_no_losses_whose_sum_has_a_gradient(kind: str) -> None:
    empty = torch.zeros(0)
    log_probs = torch.zeros(0, requires_grad=True)
    losses, marks = LOSSES[kind](log_probs, empty, empty, torch.zeros(0, dtype=torch.int64), **OPTIONS[kind])
    losses.sum().backward()
    assert all(column.shape == (0,) for column in (losses, log_probs.grad, *marks.values()))


@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_columns_are_never_broadcast(kind: str) -> None:
    columns = [torch.zeros(4), torch.zeros(4), torch.zeros(1), torch.zeros(4, dtype=torch.int64)]
    with pytest.raises(ValueError, match=r"unequal shape: .*\(4,\).*\(1,\)"):
        LOSSES[kind](*columns, **OPTIONS[kind])


def test_mistakes_in_options_are_named_before_a_run() -> None:
    check_loss_options("ppo_clip", CLIPS)
    check_loss_options("nll", {})
    with pytest.raises(ConfigError, match="did you mean 'ppo_clip'"):
        check_loss_options("ppo_clips", {})
    with pytest.raises(ConfigError, match="did you mean 'clip_high'"):
        check_loss_options("ppo_clip", {"clip_hight": 0.2})
    with pytest.raises(ConfigError, match="clip_low is 0"):
        check_loss_options("ppo_clip", {"clip_low": 0})


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
    with pytest.raises(ValueError, match="constant=None"):
        token_weights(LENGTHS, ACTIVE, "constant", responses=3, tokens=16)
    idle = token_weights(LENGTHS, np.zeros(4, bool), "sequence_mean", responses=0, tokens=0)
    assert idle.tolist() == [0.0] * 4
