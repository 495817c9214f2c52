"""Advantages against a slow, plain implementation in float64 loops, and their indifference to the order of rows."""

from __future__ import annotations

import math
from collections import defaultdict
from statistics import NormalDist, fmean, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlrl.algorithms import advantages

TOLERANCE = 1e-9
SCOPES = ["two_stage", "task", "group", "centered_task"]


def _psi(values: list[float]) -> list[float]:
    """Normal scores of `values`; ties share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    scores = [NormalDist().inv_cdf((place + 0.5) / len(values)) for place in range(len(values))]
    out = [0.0] * len(values)
    begin = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or values[order[end]] - values[order[end - 1]] > TOLERANCE:
            for row in order[begin:end]:
                out[row] = fmean(scores[begin:end])
            begin = end
    return out


def _rows_by(keys: list[object], rows: list[int]) -> list[list[int]]:
    found = defaultdict(list)
    for row in rows:
        found[keys[row]].append(row)
    return list(found.values())


def _is_uniform(rewards: list[float], rows: list[int]) -> bool:
    values = [rewards[row] for row in rows]
    return max(values) - min(values) <= TOLERANCE


def g2rpo_oracle(
    rewards: list[float], tasks: list[int], groups: list[int], scope: str, uniform_group: str, min_task_n: int
) -> list[float]:
    """G2RPO as it is written down, one group and one task at a time."""
    out = [0.0] * len(rewards)
    score = list(rewards)
    ranked = []
    valid = [row for row, reward in enumerate(rewards) if math.isfinite(reward)]
    for rows in _rows_by(list(zip(tasks, groups, strict=True)), valid):
        if uniform_group == "keep" or not _is_uniform(rewards, rows):
            ranked += rows
        values = [rewards[row] for row in rows]
        if scope in ("two_stage", "group"):
            values = _psi(values)
        elif scope == "centered_task":
            values = [value - fmean(values) for value in values]
        for row, value in zip(rows, values, strict=True):
            score[row] = value
    for rows in _rows_by(tasks, ranked):
        values = [score[row] for row in rows]
        if scope != "group" and len(rows) >= min_task_n:
            values = _psi(values)
        for row, value in zip(rows, values, strict=True):
            out[row] = value
    return out


def grpo_oracle(rewards: list[float], tasks: list[int], groups: list[int]) -> list[float]:
    """GRPO as it is written down, one group at a time."""
    out = [0.0] * len(rewards)
    valid = [row for row, reward in enumerate(rewards) if math.isfinite(reward)]
    for rows in _rows_by(list(zip(tasks, groups, strict=True)), valid):
        if not _is_uniform(rewards, rows):
            values = [rewards[row] for row in rows]
            for row in rows:
                out[row] = (rewards[row] - fmean(values)) / (stdev(values) + 1e-6)
    return out


# Rewards on a coarse grid, with noise far below the tolerance, so that ties are common and unmistakable.
REWARD = st.one_of(
    st.builds(lambda step, noise: step * 0.05 + noise, st.integers(0, 20), st.sampled_from([0.0, 1e-10, -1e-10])),
    st.sampled_from([0.0, 1.0, math.nan, math.inf]),
)
TABLE = st.lists(st.tuples(REWARD, st.integers(-1, 2), st.integers(0, 4)), max_size=60)


@settings(max_examples=150, deadline=None)
@given(TABLE, st.sampled_from(SCOPES), st.sampled_from(["exclude", "keep"]), st.sampled_from([0, 6]))
def test_g2rpo_equals_the_oracle(
    table: list[tuple[float, int, int]], scope: str, uniform_group: str, min_task_n: int
) -> None:
    rewards, tasks, groups = ([row[i] for row in table] for i in range(3))
    least = min_task_n if scope == "two_stage" else 0
    result = advantages(rewards, tasks, groups, scope=scope, uniform_group=uniform_group, min_task_n=least)
    expected = g2rpo_oracle(rewards, tasks, groups, scope, uniform_group, least)
    np.testing.assert_allclose(result.values, expected, atol=1e-9)
    assert result.dropped.tolist() == [not math.isfinite(reward) for reward in rewards]


@settings(max_examples=100, deadline=None)
@given(TABLE)
def test_grpo_equals_the_oracle(table: list[tuple[float, int, int]]) -> None:
    rewards, tasks, groups = ([row[i] for row in table] for i in range(3))
    result = advantages(rewards, tasks, groups, kind="grpo")
    np.testing.assert_allclose(result.values, grpo_oracle(rewards, tasks, groups), atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(TABLE, st.sampled_from([*SCOPES, "grpo"]), st.booleans(), st.randoms(use_true_random=False))
def test_any_order_gives_the_same_bits(
    table: list[tuple[float, int, int]], scope: str, unit: bool, random: object
) -> None:
    shuffled = list(range(len(table)))
    random.shuffle(shuffled)
    options = {"kind": "grpo"} if scope == "grpo" else {"scope": scope, "renorm": "unit_std" if unit else "none"}
    rewards, tasks, groups = (np.array([row[i] for row in table]) for i in range(3))
    if not table:
        return
    one = advantages(rewards, tasks, groups, **options)
    other = advantages(rewards[shuffled], tasks[shuffled], groups[shuffled], **options)
    assert one.values[shuffled].tobytes() == other.values.tobytes()
    for flag in ("uniform", "tied", "dropped"):
        assert getattr(one, flag)[shuffled].tolist() == getattr(other, flag).tolist()


@pytest.mark.parametrize("scope", SCOPES)
def test_continuous_rewards_in_any_order_give_the_same_bits(scope: str) -> None:
    random = np.random.default_rng(3)
    rewards, groups = random.standard_cauchy(4000), np.arange(4000) // 8
    tasks = np.array(["count", "box", "read"])[groups % 3]
    shuffled = random.permutation(4000)
    one = advantages(rewards, tasks, groups, scope=scope, renorm="unit_std")
    other = advantages(rewards[shuffled], tasks[shuffled], groups[shuffled], scope=scope, renorm="unit_std")
    assert one.values[shuffled].tobytes() == other.values.tobytes()
    assert abs(one.values.mean()) < 1e-12
