"""The settings of each step: what a schedule moves, what it leaves, and what is refused before the first step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_vlrl.algorithms import check_options
from megatron_vlrl.algorithms.scheduled import Scheduled
from megatron_vlrl.checkpoint.state import differences, summary
from megatron_vlrl.config.load import dump, load
from megatron_vlrl.config.schema import Config
from megatron_vlrl.config.stepwise import stepwise_keys, with_values
from megatron_vlrl.config.yaml_format import read_yaml, write_yaml
from megatron_vlrl.errors import ConfigError

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
# What weights over 0 need.
GROUND = (
    "algorithm.kl.reference=frozen",
    "algorithm.entropy.bands={count: [0.2, 0.6]}",
    "reward.length_bands={count: [1, 2, 3, 4]}",
)


def config_of(*overrides: str) -> Config:
    return load(None, [*GROUND, *overrides])


@pytest.mark.parametrize("key", [key.replace("NAME", "count") for key in stepwise_keys()])
def test_a_value_changes_its_own_setting_and_no_other(key: str) -> None:
    before = with_values(Config(), {key: 1.0})
    after = with_values(before, {key: 3.0})
    [change] = differences(summary(before), summary(after))
    assert change in (f"{key}: was 1.0, now 3.0", f"{key}: was 1, now 3")
    assert load(None, [f"{key}={change.rpartition(' ')[2]}"]) == after  # of the setting's own type, too


def test_each_step_has_its_values_and_all_else_as_configured() -> None:
    config = config_of(
        "train.steps=100",
        "algorithm.kl.by_task={count: 0.5, read: 0.25}",
        "schedules.algorithm.kl.by_task.count={kind: grpo_d, min: 0.04, max: 0.1}",
        "schedules.rollout.temperature={kind: piecewise, points: [[0, 1.0], [50, 0.8]]}",
    )
    settings = Scheduled(config)
    for step, beta, temperature in [(0, 0.07, 1.0), (30, 0.04, 0.88), (65, 0.07, 0.8), (99, 0.1 - 0.06 / 70, 0.8)]:
        at = settings.at(step)
        assert at.algorithm.kl.by_task == pytest.approx({"count": beta, "read": 0.25})
        assert at.rollout.temperature == pytest.approx(temperature)
        assert with_values(at, {"algorithm.kl.by_task.count": 0.5, "rollout.temperature": 1.0}) == config
        assert settings.values(step) == {
            "algorithm.kl.by_task.count": at.algorithm.kl.by_task["count"],
            "rollout.temperature": at.rollout.temperature,
        }


def test_a_resumed_run_goes_on_with_the_same_settings(tmp_path: Path) -> None:
    config = config_of("schedules.optimizer.lr={kind: cosine, start: 1e-3, end: 1e-5}")
    saved = tmp_path / "config.yaml"
    saved.write_text(dump(config))
    settings, again = Scheduled(config), Scheduled(load(saved))
    assert [again.at(step) for step in range(40, 100)] == [settings.at(step) for step in range(40, 100)]


def test_without_schedules_every_step_has_the_configuration() -> None:
    config = Config()
    assert Scheduled(config).at(7) is config


def test_a_whole_number_is_rounded_and_an_option_is_not() -> None:
    settings = Scheduled(
        config_of(
            "train.steps=8",
            "schedules.rollout.max_new_tokens={kind: linear, start: 10, end: 12}",
            "schedules.algorithm.loss.options.clip_high={kind: linear, start: 10, end: 12}",
        )
    )
    lengths = [settings.at(step).rollout.max_new_tokens for step in range(8)]
    assert lengths == [10, 10, 10, 11, 11, 11, 12, 12]
    assert {type(length) for length in lengths} == {int}
    assert settings.at(1).algorithm.loss.options == {"clip_high": 10.25}


def ramp(step: int, total: int, *, top: float) -> float:
    return top * step / total


def silent(step: int, total: int) -> None:
    return None


def test_a_schedule_of_your_own() -> None:
    config = config_of("train.steps=10", "schedules.optimizer.clip_norm={kind: tests.test_scheduled:ramp, top: 2}")
    assert [Scheduled(config).at(step).optimizer.clip_norm for step in (0, 5, 9)] == [0.0, 1.0, 1.8]


LR = "schedules.optimizer.lr"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ([LR + "={kind: linaer, start: 1, end: 0}"], [LR + ".kind", "'linaer'", "did you mean 'linear'"]),
        ([LR + "={kind: linear, start: 1, ende: 0}"], [LR, "'ende'", "did you mean 'end'"]),
        ([LR + "={kind: linear, steps: 3}"], [LR + " of kind linear needs start, end"]),
        ([LR + "={kind: linear, start: 1, end: no}"], [LR + ": end is 'no'"]),
        ([LR + "={kind: piecewise, points: [[5, 1], [0, 1]]}"], [LR + ": points has the steps [5, 0]"]),
        ([LR + "={kind: tests.test_scheduled:rampe}"], [LR + ".kind", "did you mean 'ramp'"]),
        ([LR + "={kind: tests.test_scheduled:LR}"], [LR + ".kind", "is a str, not a function"]),
        ([LR + "={kind: tests.test_scheduled:ramp, to: 1}"], [LR, "'to'", "known: top"]),
        ([LR + "={kind: tests.test_scheduled:silent}"], [LR + " gives None at step 0"]),
        (["schedules.optimizer.eps={kind: constant, value: 1}"], ["optimizer.eps is read once"]),
        # Refused at a step, which is said: the first one, at the end, and only between two good values.
        ([LR + "={kind: constant, value: -1}"], ["step 0, with optimizer.lr=-1 as scheduled", "optimizer.lr is -1.0"]),
        (
            ["train.steps=10", "schedules.rollout.temperature={kind: linear, start: 1, end: 0, steps: 9}"],
            ["step 9, with rollout.temperature=0 as", "rollout.temperature is 0.0"],
        ),
        ([LR + "={kind: piecewise, points: [[0, 1], [50, -1], [52, 1]]}"], ["step 26, ", "optimizer.lr is -0.04"]),
        (["schedules.rollout.max_new_tokens={kind: linear, start: 3, end: 0}"], ["step 84, ", "max_new_tokens is 0"]),
        (
            [
                "schedules.reward.format_weight={kind: linear, start: 0.0, end: 0.9}",
                "schedules.reward.length_weight={kind: piecewise, points: [[48, 0.0], [50, 0.7], [52, 0.0]]}",
            ],
            ["step 50, ", "reward.format_weight=0.45 and reward.length_weight=0.7"],
        ),
        (
            ["algorithm.kl.reference=none", "schedules.algorithm.kl.by_task.count={kind: linear, start: 0, end: 0.1}"],
            ["step 1, with algorithm.kl.by_task.count=0.001", "reference is 'none'"],
        ),
    ],
)
def test_what_no_run_could_use_is_refused_at_once(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        Scheduled(config_of(*overrides))
    for part in parts:
        assert part in str(error.value)


def test_other_checks_see_every_step() -> None:
    settings = Scheduled(
        config_of("schedules.algorithm.advantage.options.tie_tol={kind: linear, start: 1e-3, end: -1e-3}")
    )

    def check(config: Config) -> None:
        check_options(config.algorithm.advantage.kind, config.algorithm.advantage.options)

    with pytest.raises(
        ConfigError, match=r"step 51, with algorithm\.advantage\.options\.tie_tol=-2e-05 as scheduled: "
    ):
        settings.check(check)


def test_the_example_of_the_page_is_one(tmp_path: Path) -> None:
    [text] = re.findall(r"```yaml\n(schedules:\n.*?)```", PAGE.read_text(), re.DOTALL)
    ground = {
        "algorithm": {"kl": {"reference": "frozen"}, "entropy": {"bands": {"count": [0.2, 0.6]}}},
        "train": {"steps": 120},
    }
    path = tmp_path / "run.yaml"
    path.write_text(write_yaml(ground | read_yaml(text)))
    settings = Scheduled(load(path))
    assert len(settings.values(0)) == 3
    assert settings.at(110).algorithm.entropy.coefficient == 0.0
