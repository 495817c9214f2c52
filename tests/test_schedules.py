"""The learning rate of a step, and every kind of schedule against values worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlrl.algorithms.schedules import (
    DECAYS,
    SCHEDULES,
    constant,
    cosine,
    grpo_d,
    learning_rate,
    linear,
    piecewise,
)
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


HALF = math.sqrt(0.5)
POINTS = [[10, 1.0], [50, 0.8], [60, 2.0]]
BETA = {"min": 0.04, "max": 0.1}


@pytest.mark.parametrize(
    ("schedule", "arguments", "expected"),
    [
        (constant, {"value": 0.3}, {0: 0.3, 57: 0.3, 1000: 0.3}),
        (linear, {"start": 0.02, "end": 0.0}, {0: 0.02, 25: 0.015, 99: 0.0002, 100: 0.0, 250: 0.0}),
        (linear, {"start": 1.0, "end": 3.0, "steps": 40}, {0: 1.0, 10: 1.5, 40: 3.0, 41: 3.0}),
        (cosine, {"start": 1.0, "end": 0.0}, {0: 1.0, 25: (1 + HALF) / 2, 50: 0.5, 75: (1 - HALF) / 2, 100: 0.0}),
        (cosine, {"start": 0.1, "end": 0.5, "steps": 20}, {0: 0.1, 5: 0.3 - 0.2 * HALF, 10: 0.3, 20: 0.5, 90: 0.5}),
        (piecewise, {"points": POINTS}, {0: 1.0, 10: 1.0, 30: 0.9, 50: 0.8, 55: 1.4, 60: 2.0, 99: 2.0}),
        (piecewise, {"points": ((7, 0.5),)}, {0: 0.5, 7: 0.5, 8: 0.5}),
        # The turn is at 30 of 100; the middle of .04 and .1 is .07.
        (grpo_d, BETA, {0: 0.07, 15: 0.055, 30: 0.04, 65: 0.07, 100: 0.1, 150: 0.1}),
        (grpo_d, {**BETA, "shape": "rising"}, {0: 0.04, 15: 0.055, 30: 0.07, 65: 0.085, 100: 0.1, 150: 0.1}),
        (
            grpo_d,
            {"min": 0.0, "max": 0.02, "turn": 0.5, "steps": 40},
            {0: 0.01, 10: 0.005, 20: 0.0, 30: 0.01, 40: 0.02},
        ),
    ],
)
def test_values_by_hand(schedule: Any, arguments: dict[str, Any], expected: dict[int, float]) -> None:
    got = {step: schedule(step, 100, **arguments) for step in expected}
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-15)


NUMBERS = st.floats(-1e3, 1e3)
POSITIVES = st.floats(1e-6, 1e3)
TOTALS = st.integers(1, 500)


@settings(max_examples=60, deadline=None)
@given(start=NUMBERS, end=NUMBERS, total=TOTALS, kind=st.sampled_from([linear, cosine]))
def test_a_line_and_half_a_cosine_go_from_start_to_end_and_never_back(
    start: float, end: float, total: int, kind: Any
) -> None:
    values = [kind(step, total, start=start, end=end) for step in range(total + 3)]
    assert values[0] == start
    assert values[total:] == [end] * 3
    low, high = sorted((start, end))
    assert all(low <= value <= high for value in values)
    steepest = abs(end - start) / total * (1.0 if kind is linear else math.pi / 2)
    rounding = 1e-12 * max(abs(start), abs(end))
    for one, other in pairwise(values):
        assert abs(other - one) <= steepest + rounding
        assert (other - one) * (end - start) >= -rounding * abs(end - start)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.integers(0, 200), min_size=1, max_size=6, unique=True),
    values=st.lists(NUMBERS, min_size=6, max_size=6),
)
def test_piecewise_passes_through_its_points_and_stays_between_them(steps: list[int], values: list[float]) -> None:
    points = list(zip(sorted(steps), values, strict=False))
    for step, value in points:
        assert piecewise(step, 1, points=points) == value
    assert piecewise(points[0][0] - 1, 1, points=points) == points[0][1]
    assert piecewise(points[-1][0] + 1, 1, points=points) == points[-1][1]
    for (begin, start), (last, end) in pairwise(points):
        low, high = sorted((start, end))
        between = [piecewise(step, 1, points=points) for step in range(begin, last + 1)]
        assert all(low <= value <= high for value in between)
        assert between == pytest.approx([linear(n, last - begin, start=start, end=end) for n in range(len(between))])


@settings(max_examples=60, deadline=None)
@given(low=POSITIVES, width=POSITIVES, turn=st.floats(0.05, 0.95), total=st.integers(1, 400))
def test_grpo_d_is_the_formula_and_bounded_without_a_jump(low: float, width: float, turn: float, total: int) -> None:
    high, rounding = low + width, 1e-12 * (low + width)
    middle, bend = (low + high) / 2, turn * total
    for shape in ("paper", "rising"):
        values = [grpo_d(step, total, min=low, max=high, turn=turn, shape=shape) for step in range(total + 2)]
        assert values[0] == (middle if shape == "paper" else low)
        assert values[total:] == [high, high]
        assert all(low <= value <= high for value in values)
        steepest = max((middle - low) / bend, (high - low) / (total - bend))
        assert all(abs(other - one) <= steepest + rounding for one, other in pairwise(values))
        if shape == "rising":
            assert all(other >= one - rounding for one, other in pairwise(values))
            continue
        for step, value in enumerate(values[: total + 1]):
            fall, rise = middle - (middle - low) * step / bend, low + (high - low) * (step - bend) / (total - bend)
            assert value == pytest.approx(fall if step <= bend else rise, rel=1e-9, abs=rounding)


@pytest.mark.parametrize(
    ("kind", "arguments", "says"),
    [
        ("constant", {"value": "much"}, "value is 'much'"),
        ("constant", {"value": True}, "value is True"),
        ("constant", {"value": math.nan}, "value is nan"),
        ("linear", {"start": 1, "end": None}, "end is None"),
        ("linear", {"start": 1, "end": 2, "steps": -1}, "steps is -1"),
        ("cosine", {"start": 1, "end": 2, "steps": 2.5}, "steps is 2.5"),
        ("piecewise", {"points": []}, r"points is \[\]"),
        ("piecewise", {"points": 3}, "points is 3"),
        ("piecewise", {"points": [[0, 1], [2]]}, r"points has \[2\]"),
        ("piecewise", {"points": [[0, 1], [2, "x"]]}, "points: a value is 'x'"),
        ("piecewise", {"points": [[0, 1], [9, 2], [5, 1]]}, r"the steps \[0, 9, 5\]; write them in ascending order"),
        ("piecewise", {"points": [[0, 1], [0, 2]]}, r"the steps \[0, 0\]"),
        ("grpo_d", {"min": 0.2, "max": 0.1}, "min is 0.2 and max is 0.1"),
        ("grpo_d", {**BETA, "turn": 0}, "turn is 0"),
        ("grpo_d", {**BETA, "turn": 1}, "turn is 1"),
        ("grpo_d", {**BETA, "shape": "papr"}, "did you mean 'paper'"),
    ],
)
def test_a_wrong_argument_is_said_with_its_value(kind: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SCHEDULES[kind](0, 10, **arguments)
