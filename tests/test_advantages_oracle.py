"""Advantages against a slow, plain implementation in float64 loops, and their indifference to the order of rows."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlrl.algorithms import ADVANTAGES, AdvantageResult, advantages
from tests.advantage_oracle import Table, component_columns, informed, oracle, run

SCOPES = ["two_stage", "task", "group", "centered_task"]
BOTH = [False, True]
Case = tuple[str, Mapping[str, Any]]


def product(kind: str, **choices: list[Any]) -> list[Case]:
    """The kind with every combination of the options' choices."""
    return [(kind, dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())]


# Every kind, scope, variant and flag; what only changes a number (eps, decay) is in test_advantages.
CASES = [
    *product("g2rpo", scope=SCOPES, components=["total", "each"], uniform_group=["exclude", "keep"]),
    *product("g2rpo", scope=SCOPES, components=["total", "each"], renorm=["unit_std"]),
    *product("g2rpo", components=["total", "each"], min_task_n=[6]),
    *product("grpo", unbiased=BOTH),
    *product("dr_grpo"),
    *product("rloo"),
    *product("reinforce_plus_plus", baseline=["none", "group"], token_weighted=BOTH),
    *product("gdpo", unbiased=BOTH, token_weighted=BOTH),
    *product("ema_grpo", variant=["onethinker", "paper"], decay=[0.5]),
    *product("ones"),
]
WITH_ZERO = [(kind, {**options, "invalid_reward": "zero"}) for kind, options in CASES if kind != "ones"]

# Rewards on a coarse grid, with noise far below the tolerance, so that ties are common and unmistakable.
REWARD = st.one_of(
    st.builds(lambda step, noise: step * 0.05 + noise, st.integers(0, 20), st.sampled_from([0.0, 1e-10, -1e-10])),
    st.sampled_from([0.0, 1.0, math.nan, math.inf]),
)
COMPONENT = st.one_of(st.integers(0, 3).map(lambda step: step * 0.25), st.sampled_from([0.1 + 0.2, 0.3, math.nan]))


@st.composite
def tables(draw: st.DrawFn) -> Table:
    row = st.tuples(REWARD, st.integers(-1, 2), st.integers(0, 4), st.tuples(*[COMPONENT] * 3), st.integers(1, 9))
    rows = draw(st.lists(row, max_size=60))
    columns = [[row[place] for row in rows] for place in range(5)]
    weights = draw(st.lists(st.sampled_from([1.0, 0.3, 0.0, -0.5]), min_size=3, max_size=3))
    return Table(
        rewards=columns[0],
        tasks=columns[1],
        groups=columns[2],
        components=[list(row) for row in columns[3]],
        weights=weights,
        lengths=columns[4],
    )


def test_every_kind_is_compared() -> None:
    assert {kind for kind, _ in CASES} == set(ADVANTAGES)


def check_against_the_oracle(table: Table) -> None:
    for kind, options in [*CASES, *WITH_ZERO]:
        result = run(table, kind, options)
        expected, state = oracle(table, kind, options)
        np.testing.assert_allclose(result.values, expected, rtol=1e-9, atol=1e-9, err_msg=f"{kind} {options}")
        assert set(result.state) == set(state)
        for name, averages in state.items():
            assert result.state[name] == pytest.approx(averages, rel=1e-12, abs=1e-15)


@settings(max_examples=10, deadline=None)
@given(tables())
def test_every_kind_equals_the_oracle(table: Table) -> None:
    check_against_the_oracle(table)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(tables())
def test_every_kind_equals_the_oracle_on_many_tables(table: Table) -> None:
    check_against_the_oracle(table)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(tables())
def test_flags_say_what_the_rows_are(table: Table) -> None:
    failed = [not math.isfinite(reward) for reward in table.rewards]
    for kind, options in CASES:
        if kind == "ones":
            continue
        result = run(table, kind, options)
        each = kind == "gdpo" or options.get("components") == "each"
        columns = [column for column, _ in component_columns(table)] if each else [table.rewards]
        telling = informed(table, columns)
        assert result.dropped.tolist() == failed
        assert result.uniform.tolist() == [not bad and row not in telling for row, bad in enumerate(failed)]
        assert not (result.values != 0.0)[result.dropped].any()
        if options.get("uniform_group") != "keep" and options.get("baseline") != "none":
            assert not (result.values != 0.0)[result.uniform].any()
            assert not (result.tied & result.uniform).any()


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(tables(), st.randoms(use_true_random=False))
def test_any_order_gives_the_same_bits(table: Table, random: Random) -> None:
    shuffled = list(range(len(table.rewards)))
    random.shuffle(shuffled)
    for case in [*CASES, *WITH_ZERO]:
        one, other = run(table, *case), run(table.shuffled(shuffled), *case)
        assert one.values[shuffled].tobytes() == other.values.tobytes(), case
        for flag in ("uniform", "tied", "dropped"):
            assert getattr(one, flag)[shuffled].tolist() == getattr(other, flag).tolist()
        assert json.dumps(one.state, sort_keys=True) == json.dumps(other.state, sort_keys=True)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(st.lists(tables(), min_size=2, max_size=4), st.sampled_from(["onethinker", "paper"]))
def test_a_state_read_back_from_json_gives_the_next_advantages_to_the_bit(steps: list[Table], variant: str) -> None:
    kept: Mapping[str, Any] = {}
    read: Mapping[str, Any] = {}
    expected: dict[str, dict[str, float]] = {}
    for table in steps:
        on = run(table, "ema_grpo", {"variant": variant, "state": kept})
        resumed = run(table, "ema_grpo", {"variant": variant, "state": read})
        values, expected = oracle(table, "ema_grpo", {"variant": variant, "state": expected})
        assert on.values.tobytes() == resumed.values.tobytes()
        np.testing.assert_allclose(on.values, values, rtol=1e-9, atol=1e-9)
        kept, read = on.state, json.loads(json.dumps(on.state))
        assert read == kept


@pytest.mark.parametrize("case", CASES, ids=str)
def test_order_and_names_of_continuous_rewards_change_no_bit(case: Case) -> None:
    random = np.random.default_rng(3)
    count, (kind, options) = 4000, case
    groups = np.arange(count) // 8
    tasks = np.array(["count", "box", "read"])[groups % 3]
    components = random.standard_cauchy((count, 2))
    lengths = random.integers(1, 500, count)

    def result(order: np.ndarray, names: np.ndarray) -> AdvantageResult:
        columns = (components.sum(axis=1)[order], tasks[order], names[order], kind, components[order], [1.0, 0.2])
        return advantages(*columns, lengths=lengths[order], options=options)

    one = result(np.arange(count), groups)
    shuffled, renamed = random.permutation(count), random.permutation(10**6)[groups]
    other = result(shuffled, renamed)
    assert one.values[shuffled].tobytes() == other.values.tobytes()
    assert one.state == other.state
    if kind not in ("ones", "ema_grpo") and not options.get("token_weighted"):
        assert abs(one.values.mean()) < 1e-9
