"""The kinds beside G²RPO and GRPO: values worked out by hand, components, lengths, and the state that is kept."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.special import ndtri

from megatron_vlrl.algorithms import ADVANTAGES, AdvantageResult, RewardColumns, advantages, keeps_state
from megatron_vlrl.errors import ConfigError

GROUPS = [0, 0, 0, 0, 1, 1]
REWARDS = [0.0, 0.0, 0.5, 1.5, 2.0, 4.0]  # means 0.5 and 3
Values = list[float]


def values(rewards: Values, kind: str, **more: object) -> Values:
    return advantages(rewards, ["a"] * len(rewards), GROUPS[: len(rewards)], kind, **more).values.tolist()


def test_dr_grpo_is_the_difference_from_the_mean() -> None:
    assert values(REWARDS, "dr_grpo") == [-0.5, -0.5, 0.0, 1.0, -1.0, 1.0]


def test_rloo_is_the_difference_from_the_mean_of_the_others() -> None:
    np.testing.assert_allclose(values(REWARDS, "rloo"), [-2 / 3, -2 / 3, 0.0, 4 / 3, -2.0, 2.0], rtol=1e-15)


def test_reinforce_plus_plus_whitens_over_the_batch() -> None:
    rewards = np.array(REWARDS)
    np.testing.assert_allclose(
        values(REWARDS, "reinforce_plus_plus"), (rewards - rewards.mean()) / (rewards.std() + 1e-6), rtol=1e-13
    )
    centered = np.array([-0.5, -0.5, 0.0, 1.0, -1.0, 1.0])
    np.testing.assert_allclose(
        values(REWARDS, "reinforce_plus_plus", baseline="group"), centered / (centered.std() + 1e-6), rtol=1e-13
    )
    lengths = [3, 1, 1, 2, 1, 1]
    tokens = np.repeat(rewards, lengths)
    expected = (rewards - tokens.mean()) / (tokens.std() + 0.5)
    weighted = values(REWARDS, "reinforce_plus_plus", lengths=lengths, token_weighted=True, eps=0.5)
    np.testing.assert_allclose(weighted, expected, rtol=1e-13)


def test_reinforce_plus_plus_keeps_uniform_groups_but_gives_a_group_of_one_nothing() -> None:
    rewards, groups = [1.0, 1.0, 0.0, 0.0, 50.0], [0, 0, 1, 1, 2]
    alone = advantages(rewards, [0] * 5, groups, "reinforce_plus_plus")
    np.testing.assert_allclose(alone.values, [1, 1, -1, -1, 0], rtol=1e-5)
    assert alone.uniform.all()
    assert advantages(rewards, [0] * 5, groups, "reinforce_plus_plus", baseline="group").values.tolist() == [0.0] * 5


def test_gdpo_normalises_each_component_then_whitens_their_weighted_sum() -> None:
    # Group 0: the first component differs by one answer, the second is half and half. Group 1: only the first differs.
    table = np.array([[0, 0], [0, 1], [0, 1], [1, 0], [0, 7], [2, 7]], dtype=float)
    first = np.array([-0.5, -0.5, -0.5, 1.5, -math.sqrt(0.5), math.sqrt(0.5)])
    half = 0.5 / math.sqrt(1 / 3)
    second = np.array([-half, half, half, -half, 0.0, 0.0])
    for weights in ([1.0, 1.0], [0.8, 0.1]):
        total = weights[0] * first + weights[1] * second
        result = advantages(table.sum(axis=1), [0] * 6, GROUPS, "gdpo", table, weights)
        np.testing.assert_allclose(result.values, (total - total.mean()) / total.std(), rtol=1e-5)
        assert not (result.uniform | result.dropped).any()
    assert result.tied.tolist() == [True, True, True, False, False, False]


def test_gdpo_tells_apart_what_the_total_does_not() -> None:
    table, groups = [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [0, 0, 0]
    split = advantages([1.0, 1.0, 0.0], [0] * 3, groups, "gdpo", table, [1.0, 0.5]).values
    assert len(set(split)) == 3
    assert advantages([1.0, 1.0, 1.0], [0] * 3, groups, "gdpo", table, [1.0, 0.5]).values.tolist() == split.tolist()


def test_gdpo_by_tokens_has_a_token_mean_of_0_and_a_token_std_of_1() -> None:
    random = np.random.default_rng(0)
    table, groups, lengths = random.random((80, 3)), np.arange(80) // 8, random.integers(1, 40, 80)
    by_token = advantages(
        table.sum(axis=1), groups % 2, groups, "gdpo", table, lengths=lengths, options={"token_weighted": True}
    ).values
    tokens = np.repeat(by_token, lengths)
    assert abs(tokens.mean()) < 1e-12
    assert tokens.std() == pytest.approx(1.0, abs=1e-5)
    by_sample = advantages(table.sum(axis=1), groups % 2, groups, "gdpo", table).values
    assert by_sample.std() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("kind", "options"), [("gdpo", {}), ("g2rpo", {"components": "each"})])
def test_components_that_are_not_there_or_weigh_nothing_say_nothing(kind: str, options: dict[str, str]) -> None:
    nan = math.nan
    # Task 0 has the first component, task 1 the second; the third weighs nothing.
    table = [[0.0, nan, 5.0], [1.0, nan, 6.0], [3.0, nan, 7.0], [nan, 1.0, 8.0], [nan, 0.0, 9.0]]
    tasks, groups, weights = [0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [1.0, 1.0, 0.0]
    result = advantages([0, 1, 3, 1, 0], tasks, groups, kind, table, weights, options=options)
    merged = advantages([0, 1, 3, 1, 0], tasks, groups, kind, [[0.0], [1.0], [3.0], [1.0], [0.0]], options=options)
    np.testing.assert_array_equal(result.values, merged.values)
    assert not (result.uniform | result.tied).any()

    table[1][0] = nan  # one rollout lacks it: it is left out, and the others are compared without it
    result = advantages([0, 1, 3, 1, 0], tasks, groups, kind, table, weights, options=options)
    assert result.uniform.tolist() == [False, True, False, False, False]
    assert result.values[1] == 0.0
    assert result.values[0] == -result.values[2] < 0


@pytest.mark.parametrize(("kind", "options"), [("gdpo", {}), ("g2rpo", {"components": "each"})])
def test_tied_are_those_that_no_component_tells_apart(kind: str, options: dict[str, str]) -> None:
    table = [[0.0, 5.0, 0.0], [0.0, 5.0, 1.0], [1.0, 5.0, 1.0], [1.0, 5.0, 2.0]]  # the second is equal for all
    result = advantages([5, 6, 7, 8], [0] * 4, [0] * 4, kind, table, options=options)
    assert result.tied.tolist() == [False, True, True, False]
    assert not result.uniform.any()


@pytest.mark.parametrize(("kind", "options"), [("gdpo", {}), ("g2rpo", {"components": "each"})])
def test_the_total_says_which_rollouts_failed(kind: str, options: dict[str, str]) -> None:
    table = [[0.0, 1.0], [1.0, 1.0], [9.0, 9.0]]  # what was known before the third one's verifier failed
    failed = advantages([1.0, 2.0, math.nan], [0] * 3, [0] * 3, kind, table, options=options)
    without = advantages([1.0, 2.0], [0] * 2, [0] * 2, kind, table[:2], options=options)
    assert failed.values.tolist() == [*without.values, 0.0]
    assert failed.dropped.tolist() == [False, False, True]
    as_zero = {**options, "invalid_reward": "zero"}
    zero = advantages([1.0, 2.0, math.nan], [0] * 3, [0] * 3, kind, table, options=as_zero)
    given = advantages([1.0, 2.0, 0.0], [0] * 3, [0] * 3, kind, [*table[:2], [0.0, 0.0]], options=options)
    assert zero.values.tolist() == given.values.tolist()


def scores(*ranks: float, of: int) -> np.ndarray:
    return ndtri((np.array(ranks) + 0.5) / of)


def test_each_component_is_ranked_and_the_scores_added() -> None:
    table = [[0.0, 0.3], [0.1, 0.2], [0.9, 0.9], [1.0, 0.0]]
    total = np.sum(table, axis=1)
    options = {"scope": "group", "components": "each"}
    expected = scores(0, 1, 2, 3, of=4) + scores(2, 1, 3, 0, of=4)
    result = advantages(total, [0] * 4, [0] * 4, "g2rpo", table, options=options)
    np.testing.assert_allclose(result.values, expected, atol=1e-15)
    # A weight counts by its sign alone: less of a penalty is better, and 0 leaves a component out.
    less = advantages(total, [0] * 4, [0] * 4, "g2rpo", table, [0.9, -0.1], options=options)
    np.testing.assert_allclose(less.values, scores(0, 1, 2, 3, of=4) - scores(2, 1, 3, 0, of=4), atol=1e-15)
    one = advantages(total, [0] * 4, [0] * 4, "g2rpo", table, [0.9, 0.0], options=options)
    np.testing.assert_allclose(one.values, scores(0, 1, 2, 3, of=4), atol=1e-15)


def test_two_stages_rank_the_sum_of_the_components_scores_over_the_task() -> None:
    table = [
        [0, 0],
        [1, 1],
        [0, 1],
        [1, 0],
        [5, 0],
        [6, 0],
    ]  # scores in the group, added: -1.47, 1.47, 0, 0 and -0.67, 0.67
    result = advantages(range(6), [0] * 6, GROUPS, "g2rpo", table, options={"components": "each"})
    middle = scores(2, 3, of=6).mean()
    np.testing.assert_allclose(result.values[[2, 3]], middle, atol=1e-15)
    np.testing.assert_allclose(result.values[[0, 4, 5, 1]], scores(0, 1, 4, 5, of=6), atol=1e-15)
    assert result.tied.tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("scope", ["two_stage", "task", "group", "centered_task"])
def test_one_component_is_the_total(scope: str) -> None:
    random = np.random.default_rng(2)
    rewards, groups = random.integers(0, 4, 64) / 4, np.arange(64) // 8
    rewards[::9] = math.nan
    for keep in ("keep", "exclude"):
        options = {"scope": scope, "uniform_group": keep}
        total = advantages(rewards, groups % 2, groups, options=options)
        each = advantages(
            rewards, groups % 2, groups, "g2rpo", rewards[:, None], options={**options, "components": "each"}
        )
        np.testing.assert_array_equal(total.values, each.values)
        assert total.uniform.tolist() == each.uniform.tolist()
        assert total.dropped.tolist() == each.dropped.tolist()


def test_onethinker_divides_by_the_tasks_moving_std() -> None:
    first = advantages([0.0, 1.0, 1.0, 1.0], ["a"] * 4, [0, 0, 1, 1], "ema_grpo")
    assert first.state == {"a": {"mean": 0.75, "mean_square": 0.75}}
    spread = math.sqrt(0.75 - 0.75**2) + 1e-6
    np.testing.assert_allclose(first.values, [-0.5 / spread, 0.5 / spread, 0, 0], rtol=1e-14)

    second = advantages([0.0, 3.0], ["a"] * 2, [5, 5], "ema_grpo", state=first.state, decay=0.9)
    mean, square = 0.9 * 0.75 + 0.1 * 1.5, 0.9 * 0.75 + 0.1 * 4.5
    assert second.state["a"] == pytest.approx({"mean": mean, "mean_square": square}, rel=1e-15)
    spread = math.sqrt(square - mean**2) + 1e-6
    np.testing.assert_allclose(second.values, [-1.5 / spread, 1.5 / spread], rtol=1e-14)
    assert first.state == {"a": {"mean": 0.75, "mean_square": 0.75}}  # the old one is not written to


def test_onethinker_falls_back_to_the_groups_own_std_beyond_5() -> None:
    state = {"a": {"mean": 0.5, "mean_square": 0.25}}  # no spread so far: the least std, 1e-3, counts
    small = advantages([0.5, 0.508], ["a"] * 2, [0, 0], "ema_grpo", state=state, decay=0.999999)
    np.testing.assert_allclose(small.values, [-0.004 / 0.001001, 0.004 / 0.001001], rtol=1e-2)
    large = advantages([0.5, 0.508, 0.5, 0.6], ["a"] * 4, [0, 0, 1, 1], "ema_grpo", state=state, decay=0.999999)
    np.testing.assert_allclose(large.values, [*small.values, -1, 1], rtol=1e-2)  # only the group that is beyond


def test_onethinker_looks_at_both_sides_for_advantages_beyond_5() -> None:
    state = {"a": {"mean": 0.5, "mean_square": 0.25}}
    low = advantages([0.5] + [0.508] * 7, ["a"] * 8, [0] * 8, "ema_grpo", state=state, decay=0.999999)  # -7 and 1
    np.testing.assert_allclose(low.values, [-math.sqrt(7)] + [1 / math.sqrt(7)] * 7, rtol=1e-3)


def test_paper_divides_by_a_moving_average_of_the_groups_stds() -> None:
    rewards, groups = [0.0, 1.0, 0.0, 3.0, 2.0, 2.0], [0, 0, 1, 1, 2, 2]  # stds 0.5, 1.5, and a uniform group
    first = advantages(rewards, ["a"] * 6, groups, "ema_grpo", variant="paper")
    assert first.state == {"a": {"std": 1.0}}
    np.testing.assert_allclose(first.values, np.array([-0.5, 0.5, -1.5, 1.5, 0, 0]) / (1 + 1e-6), rtol=1e-14)
    second = advantages([0.0, 4.0], ["a"] * 2, [0, 0], "ema_grpo", variant="paper", state=first.state)
    assert second.state["a"]["std"] == pytest.approx(0.99 * 1.0 + 0.01 * 2.0, rel=1e-15)
    uniform = advantages([1.0, 1.0], ["b"] * 2, [0, 0], "ema_grpo", variant="paper", state=first.state)
    assert uniform.state == first.state
    assert uniform.values.tolist() == [0.0, 0.0]


def test_a_state_is_by_task_name_and_keeps_tasks_that_are_away() -> None:
    by_name = advantages([0.0, 1.0, 5.0, 7.0], ["b", "b", "a", "a"], [0, 0, 1, 1], "ema_grpo").state
    assert set(by_name) == {"a", "b"}
    assert by_name["a"]["mean"] == 6.0
    later = advantages([0.0, 1.0, math.nan], ["c", "c", "d"], [0, 0, 1], "ema_grpo", state=by_name).state
    assert set(later) == {"a", "b", "c"}  # of d there is no valid reward yet
    assert later["a"] == by_name["a"]
    numbered = advantages([0.0, 1.0], [7, 7], [0, 0], "ema_grpo").state
    assert set(numbered) == {"7"}
    assert json.loads(json.dumps(later)) == later


@pytest.mark.parametrize(
    "state", [{"a": {"std": 1.0}}, {"a": {"mean": 1.0}}, {"a": {"mean": math.nan, "mean_square": 1.0}}]
)
def test_a_state_of_another_form_is_refused(state: dict[str, dict[str, float]]) -> None:
    with pytest.raises(ConfigError, match=r"state: task 'a' has .* not finite numbers mean and mean_square"):
        advantages([0.0, 1.0], ["a"] * 2, [0, 0], "ema_grpo", state=state)


def counting(columns: RewardColumns, *, state: dict[str, int] | None = None) -> AdvantageResult:
    """A user's function that keeps a state."""
    flags = np.zeros(len(columns.rewards), bool)
    calls = (state or {}).get("calls", 0) + 1
    values = np.full(len(flags), float(calls))
    return AdvantageResult(values=values, uniform=flags, tied=flags, dropped=flags, state={"calls": calls})


def lengths_of(columns: RewardColumns, *, kind: float = 1.0) -> AdvantageResult:
    """A user's function that looks at lengths, and whose option has the name of a parameter of `advantages`."""
    assert columns.lengths is not None
    flags = np.zeros(len(columns.rewards), bool)
    return AdvantageResult(values=kind * columns.lengths, uniform=flags, tied=flags, dropped=flags)


def test_a_users_function_may_keep_a_state_and_have_any_option() -> None:
    name = "tests.test_advantage_kinds:counting"
    one = advantages([0.0], [0], [0], name)
    assert advantages([0.0], [0], [0], name, state=one.state).values.tolist() == [2.0]
    assert keeps_state(name)
    sized = advantages([0.0], [0], [0], "tests.test_advantage_kinds:lengths_of", lengths=[4], options={"kind": 0.5})
    assert sized.values.tolist() == [2.0]


def test_which_kinds_keep_a_state() -> None:
    assert {kind for kind in ADVANTAGES if keeps_state(kind)} == {"ema_grpo"}
    with pytest.raises(ConfigError, match="unknown 'ema'"):
        keeps_state("ema")
