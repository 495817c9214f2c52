"""What a rollout and its group refuse to be."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.groups import make_group


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_rollout_has_a_temperature_over_0(temperature: float) -> None:
    rollout = make_group(0, [2]).rollouts[0]
    with pytest.raises(ValueError, match=f"over 0, not {temperature}"):
        replace(rollout, temperature=temperature)


def test_the_rollouts_of_a_group_have_one_temperature() -> None:
    group = make_group(3, [2, 2])
    first, second = group.rollouts
    with pytest.raises(ValueError, match=r"'count-3' has rollouts of the temperatures \[0\.5, 1\.0\]"):
        replace(group, rollouts=(first, replace(second, temperature=0.5)))
