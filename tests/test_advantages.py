"""Advantages: the worked values; ties, uniform groups and failed rewards; what each mistake is told."""

from __future__ import annotations

import math
import subprocess
import sys
from types import FrameType

import numpy as np
import pytest

from megatron_vlrl.algorithms import ADVANTAGES, AdvantageResult, RewardColumns, advantages, check_options
from megatron_vlrl.errors import ConfigError, TrainingError

# Three prompts of one task, 8 answers each, of which 1, 4 and 7 are right.
BINARY = np.array([[1.0] * k + [0.0] * (8 - k) for k in (1, 4, 7)]).ravel()
PROMPT = np.repeat([0, 1, 2], 8)


def _one_group(rewards: object, **options: object) -> np.ndarray:
    rewards = np.asarray(rewards, dtype=np.float64)
    return advantages(rewards, [0] * len(rewards), [0] * len(rewards), **options).values


@pytest.mark.parametrize(
    ("scope", "means"),
    [("task", [-0.59, 0, 0.59]), ("two_stage", [-0.08, 0, 0.08]), ("group", [0, 0, 0])],
)
def test_difficulty_of_a_prompt_leaks_only_where_the_scope_says(scope: str, means: list[float]) -> None:
    values = advantages(BINARY, np.zeros(24, int), PROMPT, scope=scope).values
    np.testing.assert_allclose(values.reshape(3, 8).mean(axis=1), means, atol=0.006)


def test_spread_without_ties() -> None:
    eight = _one_group(np.arange(8))
    assert eight.max() == pytest.approx(1.534, abs=5e-4)
    assert eight.var() == pytest.approx(0.851, abs=5e-4)
    assert _one_group(np.arange(4)).var() == pytest.approx(0.712, abs=5e-4)
    assert _one_group(np.arange(1024)).var() == pytest.approx(0.999, abs=5e-4)


@pytest.mark.parametrize(("k", "high", "low", "variance"), [(1, 1.53, -0.22, 0.34), (4, 0.77, -0.77, 0.59)])
def test_binary_rewards_of_a_group(k: int, high: float, low: float, variance: float) -> None:
    values = _one_group([1.0] * k + [0.0] * (8 - k))
    np.testing.assert_allclose(values, [high] * k + [low] * (8 - k), atol=0.006)
    assert values.var() == pytest.approx(variance, abs=0.006)


@pytest.mark.parametrize(("rate", "variance"), [(0.5, 0.636), (0.1, 0.341), (0.02, 0.117)])
def test_binary_rewards_of_a_large_task(rate: float, variance: float) -> None:
    assert _one_group(np.arange(1024) < round(1024 * rate)).var() == pytest.approx(variance, abs=5e-4)


def test_rank_sees_order_not_size() -> None:
    values = _one_group([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(values, [0.767] * 4 + [-0.767] * 4, atol=5e-4)
    shaped = _one_group([1.04, 1.03, 1.02, 1.01, 0.04, 0.03, 0.02, 0.01])
    np.testing.assert_allclose(shaped[:5], [1.53, 0.89, 0.49, 0.16, -0.16], atol=6e-3)


def test_grpo_is_the_standard_score_of_the_group() -> None:
    rewards = np.array([0.1, 0.4, 1.0, 0.3])
    expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(_one_group(rewards, kind="grpo"), expected, rtol=1e-14)
    biased = (rewards - rewards.mean()) / (rewards.std() + 0.5)
    np.testing.assert_allclose(_one_group(rewards, kind="grpo", unbiased=False, eps=0.5), biased, rtol=1e-14)


def test_ones_are_ones_even_for_failed_rewards() -> None:
    result = advantages([0.0, math.nan, 1.0], ["a"] * 3, [0, 0, 1], kind="ones")
    assert result.values.tolist() == [1.0, 1.0, 1.0]
    assert not (result.uniform | result.tied | result.dropped).any()


@pytest.mark.parametrize("scope", ["two_stage", "task", "group", "centered_task"])
def test_noise_of_float_sums_splits_no_tie(scope: str) -> None:
    exact = [0.3, 0.3, 0.3, 0.0, 0.9, 0.3, 0.0, 0.3]
    noisy = [0.1 + 0.2, 0.3, 0.3 + 4e-10, 0.0, 0.9, 0.3 - 4e-10, 1e-17, 0.3]
    groups = [0, 0, 0, 0, 1, 1, 1, 1]
    left, right = (advantages(r, [0] * 8, groups, scope=scope) for r in (exact, noisy))
    np.testing.assert_allclose(left.values, right.values, atol=1e-12)
    assert left.tied.tolist() == right.tied.tolist()


def test_values_on_both_sides_of_a_rounding_boundary_are_tied() -> None:
    boundary = 0.5e-9  # half a multiple of the default tolerance
    values = _one_group([0.25 + boundary - 1e-12, 0.25 + boundary + 1e-12, 1.0])
    assert values[0] == values[1]


def test_tolerance_is_an_option() -> None:
    assert len(set(_one_group([0.0, 0.05, 1.0]))) == 3
    assert len(set(_one_group([0.0, 0.05, 1.0], tie_tol=0.1))) == 2
    assert len(set(_one_group([0.0, 1e-12, 1.0], tie_tol=0))) == 3


@pytest.mark.parametrize("kind", sorted(ADVANTAGES.keys() - {"ones", "reinforce_plus_plus"}))
def test_uniform_groups_and_groups_of_one_get_exactly_nothing(kind: str) -> None:
    rewards = [0.7, 0.7 + 1e-17, 0.7, 0.2, 0.0, 1.0]
    result = advantages(rewards, [0] * 6, [0, 0, 0, 1, 2, 2], kind, np.array([rewards]).T)
    assert result.values[:4].tolist() == [0.0] * 4
    assert result.uniform.tolist() == [True] * 4 + [False] * 2
    assert result.values[4] == -result.values[5] < 0


def test_all_uniform_is_all_zero() -> None:
    for scope in ("two_stage", "task", "group", "centered_task"):
        result = advantages([1.0, 1.0, 0.0, 0.0], [0] * 4, [0, 0, 1, 1], scope=scope, renorm="unit_std")
        assert result.values.tolist() == [0.0] * 4
        assert result.uniform.all()


@pytest.mark.parametrize("size", [1, 3, 8, 1000])
def test_one_tie_is_exactly_zero_so_that_no_norm_blows_it_up(size: int) -> None:
    for scope in ("two_stage", "task", "group", "centered_task"):
        values = _one_group([0.7] * size, scope=scope, uniform_group="keep", renorm="unit_std")
        assert values.tolist() == [0.0] * size


def test_a_uniform_group_can_be_kept_in_the_ranking() -> None:
    rewards, groups = [1.0] * 4 + [0.0] * 3 + [1.0], [0] * 4 + [1] * 4
    kept = advantages(rewards, [0] * 8, groups, uniform_group="keep")
    assert kept.uniform.tolist() == [True] * 4 + [False] * 4
    assert set(kept.values[:4]) == {kept.values[0]}
    assert kept.values[0] > 0.1  # the baseline leaks, as in the authors' release
    excluded = advantages(rewards, [0] * 8, groups, uniform_group="exclude")
    np.testing.assert_array_equal(excluded.values[4:], _one_group(rewards[4:]))


@pytest.mark.parametrize("kind", ["g2rpo", "grpo"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_failed_rewards(kind: str, bad: float) -> None:
    rewards = [1.0, bad, 0.0, 0.5]
    result = advantages(rewards, ["a"] * 4, ["g"] * 4, kind=kind)
    assert result.dropped.tolist() == [False, True, False, False]
    assert result.values[1] == 0.0
    np.testing.assert_array_equal(result.values[[0, 2, 3]], _one_group([1.0, 0.0, 0.5], kind=kind))

    as_zero = advantages(rewards, ["a"] * 4, ["g"] * 4, kind=kind, invalid_reward="zero")
    np.testing.assert_array_equal(as_zero.values, _one_group([1.0, 0.0, 0.0, 0.5], kind=kind))
    assert not as_zero.dropped.any()

    with pytest.raises(TrainingError, match=r"1 of 4 rewards are not finite \(first: .* in row 1\)"):
        advantages(rewards, ["a"] * 4, ["g"] * 4, kind=kind, invalid_reward="error")


@pytest.mark.parametrize("kind", sorted(ADVANTAGES))
def test_nothing_in_nothing_out_and_nothing_but_failures(kind: str) -> None:
    nothing = advantages([], [], [], kind, np.zeros((0, 2)))
    assert nothing.values.shape == (0,)
    assert nothing.state == {}
    if kind != "ones":
        failed = advantages([math.nan] * 3, [0, 0, 1], [0, 0, 0], kind, [[1.0], [0.0], [0.0]])
        assert failed.values.tolist() == [0.0] * 3
        assert failed.dropped.all()
        assert not failed.uniform.any()
        assert failed.state == {}


@pytest.mark.parametrize("far", [2**20, 2**40, 2**62])
def test_ids_may_be_any_integers(far: int) -> None:
    rewards = np.random.default_rng(1).random(16)
    tasks, groups = np.repeat([0, 1], 8), np.tile(np.repeat([0, 1], 4), 2)
    near = advantages(rewards, tasks, groups)
    away = advantages(rewards, np.where(tasks, far, -far), np.where(groups, -far, far))
    np.testing.assert_array_equal(near.values, away.values)


def test_more_groups_than_16_bits_hold() -> None:
    groups = np.arange(70_000).repeat(2)
    values = advantages(np.tile([0.0, 1.0], 70_000), np.zeros(140_000, int), groups, kind="dr_grpo").values
    assert values.tolist() == [-0.5, 0.5] * 70_000


@pytest.mark.parametrize("groups", [[0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 2]])
def test_a_group_need_not_be_in_one_place_nor_of_one_size(groups: list[int]) -> None:
    rewards = np.random.default_rng(2).random(8)
    order = np.argsort(groups, kind="stable")
    sorted_values = advantages(rewards[order], [0] * 8, np.array(groups)[order], kind="dr_grpo").values
    values = advantages(rewards, [0] * 8, groups, kind="dr_grpo").values
    assert values[order].tolist() == sorted_values.tolist()
    for group in set(groups):
        members = np.equal(groups, group)
        np.testing.assert_allclose(values[members], rewards[members] - rewards[members].mean(), atol=1e-15)


@pytest.mark.parametrize("size", [64, 65])
def test_scores_of_a_group_do_not_depend_on_how_large_another_is(size: int) -> None:
    rewards = np.random.default_rng(4).random(size + 300)
    groups = np.repeat([0, 1], [size, 300])
    both = advantages(rewards, groups, groups, scope="group").values
    assert both[:size].tolist() == _one_group(rewards[:size], scope="group").tolist()


def test_groups_are_told_apart_within_tasks() -> None:
    rewards = [0.0, 1.0, 5.0, 9.0]
    shared = advantages(rewards, ["a", "a", "b", "b"], [7, 7, 7, 7])
    apart = advantages(rewards, ["a", "a", "b", "b"], [1, 1, 2, 2])
    np.testing.assert_array_equal(shared.values, apart.values)
    assert shared.values[0] == shared.values[2] < 0


def test_a_task_with_few_rows_keeps_its_scores_within_the_group() -> None:
    tasks = ["big"] * 8 + ["small"] * 4
    rewards = [0, 1, 2, 3, 0, 0, 0, 1, 0, 0, 1, 1]
    groups = [0] * 4 + [1] * 4 + [2] * 2 + [3] * 2
    rewards[8:12] = [0, 1, 0, 1]
    mixed = advantages(rewards, tasks, groups, min_task_n=5).values
    np.testing.assert_array_equal(mixed[:8], advantages(rewards, tasks, groups).values[:8])
    np.testing.assert_array_equal(mixed[8:], advantages(rewards, tasks, groups, scope="group").values[8:])
    ranked = advantages(rewards, tasks, groups).values
    assert not np.array_equal(mixed[8:], ranked[8:])
    np.testing.assert_array_equal(advantages(rewards, tasks, groups, min_task_n=4).values, ranked)


@pytest.mark.parametrize("scope", ["two_stage", "task", "group", "centered_task"])
def test_unit_std_holds_for_each_task(scope: str) -> None:
    rewards = np.concatenate([BINARY, BINARY * 100.0])
    tasks, groups = np.repeat([3, 1], 24), np.tile(PROMPT, 2)
    values = advantages(rewards, tasks, groups, scope=scope, renorm="unit_std").values.reshape(2, 24)
    np.testing.assert_allclose(values.std(axis=1), 1.0, rtol=1e-12)


def test_reversed_rewards_reverse_the_advantages_exactly() -> None:
    rewards = np.random.default_rng(0).permutation(np.repeat(np.arange(6.0), [1, 2, 1, 3, 1, 1]))
    np.testing.assert_allclose(_one_group(rewards), -_one_group(-rewards), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("kind", "options", "parts"),
    [
        ("g2rpo", {"tie_tolerance": 1}, ["options of g2rpo", "'tie_tolerance'", "did you mean 'tie_tol'", "scope"]),
        ("g2rpo", {"components": "each"}, ["option `components`", "options={'components': 'each'}"]),
        ("g2rpo", {"options": {"components": "all"}}, ["option components", "known: each, total"]),
        ("g2rpo", {"options": {"eps": 1}}, ["unknown 'eps'", "components, invalid_reward, min_task_n, renorm, scope"]),
        ("g2rpo", {"scope": "two-stage"}, ["option scope", "did you mean 'two_stage'"]),
        ("g2rpo", {"uniform_group": "drop"}, ["option uniform_group", "exclude, keep"]),
        ("g2rpo", {"invalid_reward": "nan"}, ["option invalid_reward", "drop, error, zero"]),
        ("g2rpo", {"renorm": "std"}, ["option renorm", "none, unit_std"]),
        ("g2rpo", {"tie_tol": -1.0}, ["option tie_tol", "-1.0", "0 or more"]),
        ("g2rpo", {"tie_tol": math.nan}, ["option tie_tol"]),
        ("g2rpo", {"min_task_n": 2.5}, ["option min_task_n", "2.5"]),
        ("g2rpo", {"min_task_n": 4, "scope": "task"}, ["min_task_n=4", "'task'"]),
        ("grpo", {"scope": "task"}, ["options of grpo", "eps, invalid_reward, tie_tol, unbiased"]),
        ("grpo", {"eps": 0}, ["option eps", "above 0"]),
        ("grpo", {"unbiased": 1}, ["option unbiased"]),
        ("dr_grpo", {"eps": 1}, ["options of dr_grpo", "invalid_reward, tie_tol"]),
        ("rloo", {"tie_tol": "no"}, ["option tie_tol", "'no'"]),
        ("ema_grpo", {"variant": "one_thinker"}, ["option variant", "did you mean 'onethinker'"]),
        ("ema_grpo", {"decay": 1.0}, ["option decay", "1.0", "below 1"]),
        ("gdpo", {"token_weighted": 1}, ["option token_weighted", "true or false"]),
        ("reinforce_plus_plus", {"baseline": "groups"}, ["option baseline", "did you mean 'group'"]),
        ("ones", {"eps": 1}, ["options of ones", "known: none"]),
        ("gprо", {}, ["algorithm.advantage.kind", "did you mean 'grpo'"]),  # noqa: RUF001 - a look-alike letter
        ("math:pi", {}, ["'math:pi' is a float, not a function"]),
    ],
)
def test_mistakes_in_options_are_named(kind: str, options: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        advantages([0.0, 1.0], [0, 0], [0, 0], kind=kind, **options)
    for part in parts:
        assert part in str(caught.value)


def test_options_can_be_checked_before_the_first_step() -> None:
    check_options("g2rpo", {"scope": "task", "tie_tol": 1e-6})
    check_options("tests.test_advantages:first_component", {"scale": 2.0})
    with pytest.raises(ConfigError, match="did you mean 'group'"):
        check_options("g2rpo", {"scope": "groups"})
    check_options("g2rpo", {"components": "each"})
    check_options("gdpo", {"token_weighted": True})
    with pytest.raises(ConfigError, match="option components: unknown 'every'"):
        check_options("g2rpo", {"components": "every"})
    with pytest.raises(ConfigError, match="`state` is kept by the run"):
        check_options("ema_grpo", {"state": {}})
    with pytest.raises(ConfigError, match="unknown 'state'"):
        check_options("grpo", {"state": {}})


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        (([0.0, 1.0], [0], [0, 0]), "tasks have shape"),
        (([0.0, 1.0], [0, 0], [0, 0, 0]), "groups have shape"),
        (([[0.0, 1.0]], [0, 0], [0, 0]), "rewards have shape"),
        (([0.0, 1.0], [0.5, 0.5], [0, 0]), "tasks are of type float64"),
        (([0.0, 1.0], [0, 0], [None, None]), "groups are of type object"),
        (([0.0, 1.0], [0, 0], [0, 0], "g2rpo", [[1.0]]), "components have shape"),
        (([0.0], [0], [0], "gdpo", [[1.0, 2.0]], [1.0]), r"component_weights have shape \(1,\), components \(1, 2\)"),
        (([0.0], [0], [0], "gdpo", [[1.0, 2.0]], [1.0, math.nan]), "component_weights are not all finite"),
        (([0.0], [0], [0], "gdpo", None, [1.0]), "component_weights are given without components"),
        (([0.0], [0], [0], "gdpo"), "there are no components"),
    ],
)
def test_columns_of_another_form_are_refused(columns: tuple[object, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        advantages(*columns)


@pytest.mark.parametrize("lengths", [[1], [0, 3], [1.5, 2.0]])
def test_lengths_are_tokens_of_each_response(lengths: list[float]) -> None:
    with pytest.raises(ValueError, match="lengths are not 2 whole numbers of 1 or more"):
        advantages([0.0, 1.0], [0, 0], [0, 0], lengths=lengths)
    with pytest.raises(ValueError, match="token_weighted needs the tokens"):
        advantages([0.0, 1.0], [0, 0], [0, 0], "reinforce_plus_plus", token_weighted=True)


def first_component(columns: RewardColumns, *, scale: float = 1.0) -> AdvantageResult:
    """A user's function, which looks at the components."""
    assert columns.components is not None
    flags = np.zeros(len(columns.rewards), bool)
    return AdvantageResult(values=columns.components[:, 0] * scale, uniform=flags, tied=flags, dropped=flags)


def test_a_users_function_stands_where_a_name_does() -> None:
    kind, table = "tests.test_advantages:first_component", [[3.0, 0.0], [4.0, 0.0]]
    assert advantages([0, 1], [0, 0], [0, 0], kind, table, scale=2).values.tolist() == [6.0, 8.0]
    with pytest.raises(ConfigError, match="did you mean 'scale'"):
        advantages([0, 1], [0, 0], [0, 0], kind, table, scales=2)
    with pytest.raises(TrainingError, match="did not give 2 finite"):
        advantages([0, 1], [0, 0], [0, 0], kind, table, scale=math.inf)


@pytest.mark.parametrize("kind", sorted(ADVANTAGES.keys() - {"ema_grpo"}))  # its state is by task
def test_no_python_loop_over_groups_or_tasks(kind: str) -> None:
    def calls(prompts: int) -> int:
        count = 0

        def profile(frame: FrameType, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        rewards = np.random.default_rng(0).random(prompts * 8)
        groups = np.arange(prompts * 8) // 8
        tasks = groups // 2
        sys.setprofile(profile)
        try:
            advantages(rewards, tasks, groups, kind, rewards[:, None])
        finally:
            sys.setprofile(None)
        return count

    calls(2)  # caches of the first call
    assert calls(4) == calls(300)


def test_import_is_torch_free() -> None:
    code = (
        "import sys, megatron_vlrl.algorithms as a; a.advantages([0, 1], [0, 0], [0, 0]); print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
