"""The draw of one token: keyed uniforms, inverse CDF, and settings that cannot be drawn with."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from megatron_vlrl.errors import RolloutError
from megatron_vlrl.rollout.sampling import check_sampling, draw, uniforms
from megatron_vlrl.types import Sampling

JUST_BELOW_ONE = 1 - 2**-53


def test_uniforms_are_a_function_of_their_key_and_a_longer_call_extends_a_shorter_one() -> None:
    long = uniforms(7, 3, 1, 100)
    assert np.array_equal(uniforms(7, 3, 1, 10), long[:10])
    assert long.dtype == np.float64
    assert ((long >= 0) & (long < 1)).all()
    others = [uniforms(8, 3, 1, 100), uniforms(7, 4, 1, 100), uniforms(7, 3, 2, 100), uniforms(3, 7, 1, 100)]
    for other in others:
        assert not np.isin(other, long).any()


def test_uniforms_take_a_negative_seed() -> None:
    assert not np.array_equal(uniforms(-1, 0, 0, 4), uniforms(1, 0, 0, 4))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution_of_the_temperature(temperature: float) -> None:
    logits = torch.tensor([1.0, -0.5, -torch.inf, 0.3, 2.0])
    count = 20_000
    tokens, log_probs = draw(logits.expand(count, -1), torch.from_numpy(uniforms(0, 0, 0, count)), temperature)
    expected = torch.softmax(logits.double() / temperature, dim=0)
    seen = torch.bincount(tokens, minlength=5)
    assert seen[2] == 0
    possible = expected > 0
    assert chisquare(seen[possible].numpy(), (expected[possible] * count).numpy()).pvalue > 1e-3
    assert torch.allclose(log_probs.double(), expected[tokens].log(), atol=1e-6)


@pytest.mark.parametrize("uniform", [0.0, 5e-324, 0.5, JUST_BELOW_ONE])
def test_a_token_without_probability_is_never_drawn(uniform: float) -> None:
    # Banned first, last and between; a tail whose probability underflows to 0.
    logits = torch.full((64, 1000), -torch.inf)
    allowed = torch.arange(64) * 7 + 3
    logits[torch.arange(64), allowed] = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 30
    logits[:, 998] = -1e4
    tokens, log_probs = draw(logits, torch.full((64,), uniform, dtype=torch.float64), 1.0)
    assert torch.equal(tokens, allowed)
    assert torch.equal(log_probs, torch.zeros(64))


def test_the_largest_uniform_draws_the_last_possible_token_whatever_the_sum_rounds_to() -> None:
    logits = torch.randn(5000, 40, generator=torch.Generator().manual_seed(2)) * 3
    logits[:, 37:] = -torch.inf
    totals = logits.softmax(-1).double().sum(-1)
    assert (totals < 1).any()
    assert (totals > 1).any()
    tokens, _ = draw(logits, torch.full((5000,), JUST_BELOW_ONE, dtype=torch.float64), 1.0)
    assert (tokens == 36).float().mean() > 0.99  # its own share of the sum may be below one rounding
    assert tokens.max() == 36


def test_the_last_token_of_a_large_vocabulary_can_be_drawn() -> None:
    logits = torch.zeros(1, 151_936)
    tokens, _ = draw(logits, torch.tensor([JUST_BELOW_ONE], dtype=torch.float64), 1.0)
    assert tokens.item() == 151_935
    middle, _ = draw(logits, torch.tensor([0.5], dtype=torch.float64), 1.0)
    assert abs(middle.item() - 151_936 / 2) <= 1


def test_rare_tokens_behind_a_likely_one_keep_their_share() -> None:
    rare = 1e-8
    logits = torch.tensor([0.0, *[math.log(rare)] * 100_000])
    wanted = torch.arange(10, 99_990, 997)
    chance = (1 + rare * (wanted.double() + 0.5)) / (1 + rare * 100_000)
    tokens, _ = draw(logits.expand(len(wanted), -1), chance, 1.0)
    assert (tokens - 1 - wanted).abs().max() <= 3  # float32 steps near 1 hold 6 such tokens


def test_temperature_zero_takes_the_largest_logit_with_the_log_prob_of_temperature_one() -> None:
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(1))
    tokens, log_probs = draw(logits, torch.zeros(16, dtype=torch.float64), 0.0)
    assert torch.equal(tokens, logits.argmax(-1))
    assert torch.allclose(log_probs, logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_without_a_distribution_are_refused(bad: float, temperature: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 4] = bad
    with pytest.raises(RolloutError, match="not finite"):
        draw(logits, torch.zeros(3, dtype=torch.float64), temperature)
    with pytest.raises(RolloutError, match="not finite"):
        draw(torch.full((1, 5), -torch.inf), torch.zeros(1, dtype=torch.float64), temperature)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n": 0}, "n 0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"temperature": -0.5}, "temperature -0.5"),
        ({"stop_token_ids": (1, 400)}, r"\[400\]"),
        ({"banned_token_ids": (-1,)}, r"\[-1\]"),
    ],
)
def test_settings_that_cannot_be_drawn_with_are_named(change: dict[str, object], says: str) -> None:
    good: dict[str, object] = {"n": 2, "temperature": 1.0, "max_new_tokens": 4, "stop_token_ids": (1,)}
    check_sampling(Sampling(**good), 384)  # type: ignore[arg-type]
    with pytest.raises(RolloutError, match=says):
        check_sampling(Sampling(**{**good, **change}), 384)  # type: ignore[arg-type]
