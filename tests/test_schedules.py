"""The learning rate of a step."""

from __future__ import annotations

import pytest

from megatron_vlrl.algorithms.schedules import DECAYS, learning_rate
from megatron_vlrl.errors import ConfigError

RUN = {"base": 3e-4, "steps": 120, "warmup": 5, "final_ratio": 0.1}


def test_linear_decay_runs_from_step_0_beneath_the_warm_up() -> None:
    rates = [learning_rate(step, decay="linear", **RUN) for step in range(120)]
    # The recipe's own line: lr * min(1, (step + 1) / warmup) * (1 - (1 - 0.1) * step / steps)
    assert rates[0] == pytest.approx(3e-4 / 5)
    assert rates[3] == pytest.approx(3e-4 * 0.8 * (1 - 0.9 * 3 / 120))
    assert rates[4] == pytest.approx(3e-4 * (1 - 0.9 * 4 / 120))
    assert rates[60] == pytest.approx(3e-4 * 0.55)
    assert max(rates) == rates[4]


def test_cosine_is_half_way_in_the_middle() -> None:
    run = {**RUN, "warmup": 0}
    assert learning_rate(0, decay="cosine", **run) == pytest.approx(3e-4)
    assert learning_rate(60, decay="cosine", **run) == pytest.approx(3e-4 * 0.55)
    assert learning_rate(30, decay="cosine", **run) > learning_rate(30, decay="linear", **run)


@pytest.mark.parametrize("decay", sorted(DECAYS))
def test_it_ends_at_the_final_ratio_and_stays_there(decay: str) -> None:
    final = 3e-4 if decay == "constant" else 3e-5
    assert learning_rate(120, decay=decay, **RUN) == pytest.approx(final)
    assert learning_rate(500, decay=decay, **RUN) == pytest.approx(final)


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        learning_rate(0, decay="cosin", **RUN)
    with pytest.raises(ConfigError, match=r"train\.steps is 0"):
        learning_rate(0, decay="linear", **{**RUN, "steps": 0})
