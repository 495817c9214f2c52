"""Entropy shaping: sides and weights, and that the linear term is the hinges' subgradient however it is split."""

from __future__ import annotations

import pytest
import torch

from megatron_vlrl.algorithms.shaping import entropy_sides, entropy_weights
from megatron_vlrl.config.schema import AlgorithmConfig, EntropyConfig
from megatron_vlrl.errors import ConfigError
from megatron_vlrl.train.token_loss import entropy_surrogate, measured_entropy

BANDS = {"high": (0.2, 0.6), "low": (0.2, 0.6), "inside": (0.2, 0.6), "edge": (0.5, 0.5), "absent": (0.2, 0.6)}


def test_sides_of_the_band() -> None:
    sums = {"high": 7.0, "low": 1.0, "inside": 4.0, "edge": 5.0, "absent": 0.0, "without band": 99.0}
    counts = {"high": 10, "low": 10, "inside": 10, "edge": 10, "absent": 0, "without band": 10}
    sides = entropy_sides(sums, counts, BANDS)
    assert sides == {"high": 1, "low": -1, "inside": 0, "edge": 0, "absent": 0, "without band": 0}
    weights = entropy_weights(sides, counts, 0.02)
    assert weights == {"high": 0.002, "low": -0.002, "inside": 0, "edge": 0, "absent": 0, "without band": 0}


def test_a_band_out_of_order_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"band \(0.6, 0.2\) is out of order"):
        entropy_sides({"a": 1.0}, {"a": 2}, {"a": (0.6, 0.2)})


def test_split_into_microbatches_it_has_the_gradient_of_the_hinges() -> None:
    """Two shards of four microbatches against the whole batch's hinges by autograd."""
    coefficient = 0.02
    random = torch.Generator().manual_seed(1)
    tasks = ["high", "low", "inside"]
    level = {"high": 0.9, "low": 0.05, "inside": 0.4}
    task_of = [tasks[int(i)] for i in torch.randint(3, (80,), generator=random)]
    entropy = torch.tensor([level[t] for t in task_of], dtype=torch.float64)
    entropy = (entropy * (1 + 0.1 * torch.rand(80, generator=random, dtype=torch.float64))).requires_grad_()

    hinges = torch.zeros((), dtype=torch.float64)
    for task in tasks:
        mean = entropy[[i for i, t in enumerate(task_of) if t == task]].mean()
        low, high = BANDS[task]
        hinges = hinges + torch.relu(mean - high) + torch.relu(low - mean)
    (coefficient * hinges).backward()
    expected = entropy.grad.clone()
    entropy.grad = None

    sums = {t: sum(h for h, x in zip(entropy.tolist(), task_of, strict=True) if x == t) for t in [*tasks, "absent"]}
    counts = {t: task_of.count(t) for t in [*tasks, "absent"]}
    weights = entropy_weights(entropy_sides(sums, counts, BANDS), counts, coefficient)
    for microbatch in torch.arange(80).chunk(8):
        weight = torch.tensor([weights[task_of[int(i)]] for i in microbatch], dtype=torch.float64)
        (weight * entropy[microbatch]).sum().backward()
    torch.testing.assert_close(entropy.grad, expected, rtol=1e-12, atol=0)
    assert len(set(expected.sign().tolist())) == 3


@pytest.mark.parametrize("estimator", ["full", "nll", "score"])
def test_expected_gradients_of_the_estimators(estimator: str) -> None:
    """Over the policy's own words `full` and `score` have the entropy's gradient, and `nll` has none."""
    algorithm = AlgorithmConfig(entropy=EntropyConfig(estimator=estimator))
    draw = torch.Generator().manual_seed(2)
    logits = (2 * torch.randn(7, generator=draw, dtype=torch.float64)).requires_grad_()
    log_probs = logits.log_softmax(0)
    entropy = -(log_probs.exp() * log_probs).sum()
    surrogate = entropy_surrogate(log_probs, entropy.expand(7), algorithm)
    share = log_probs.detach().exp()
    (gradient,) = torch.autograd.grad((share * surrogate).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(entropy, logits, retain_graph=True)
    assert expected.norm() > 0.1
    torch.testing.assert_close(gradient, torch.zeros(7).double() if estimator == "nll" else expected)

    measured = measured_entropy(log_probs, entropy.expand(7), algorithm)
    torch.testing.assert_close((share * measured).sum(), entropy)
    assert torch.equal(measured, -log_probs) == (estimator == "nll")
