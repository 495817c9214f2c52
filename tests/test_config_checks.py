"""Each check of a Config: what it refuses, that it names the values, and that all are told at once."""

from __future__ import annotations

import pytest

from megatron_vlrl.config import checks
from megatron_vlrl.config.checks import check, require, tasks_not_there
from megatron_vlrl.config.load import keys, load
from megatron_vlrl.config.schema import Config
from megatron_vlrl.errors import ConfigError


def test_the_defaults_pass():
    check(Config())


@pytest.mark.parametrize("key", [*checks.AT_LEAST, *checks.POSITIVE, *checks.SHARES])
def test_every_bounded_setting_refuses_what_is_below(key):
    with pytest.raises(ConfigError, match=rf"{key} is -1"):
        check(load(None, [f"{key}=-1"]))


def test_every_number_has_a_bound():
    """A new numeric setting must be given one, or a check of its own."""
    numeric = {key for key, annotation in keys().items() if annotation in (int, float)}
    assert numeric == {*checks.AT_LEAST, *checks.POSITIVE, *checks.SHARES}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["data.prompts_per_step=10", "parallel.data=4"], ["prompts_per_step=10", "parallel.data=4", "8 or 12"]),
        (["data.prompts_per_step=2", "parallel.data=4"], ["prompts_per_step=2", "parallel.data=4"]),
        (["data.prompts_per_step=8", "parallel.data=4", "train.minibatches=3"], ["minibatches=3", "2 prompts"]),
        (["rollout.temperature=0"], ["rollout.temperature is 0.0"]),
        (["algorithm.loss.importance_cap=0.5"], ["importance_cap is 0.5", "use 1 or more"]),
        (["algorithm.kl.by_task.count=-0.1"], ["algorithm.kl.by_task.count is -0.1"]),
        (["algorithm.kl.coefficient=0.04"], ["algorithm.kl has a coefficient of 0.04", "reference is 'none'"]),
        (["algorithm.kl.by_task.count=0.1"], ["algorithm.kl has a coefficient of 0.1", "reference is 'none'"]),
        (["data.weights={a: -1}"], ["data.weights.a is -1.0"]),
        (["data.weights={a: 0, b: 0}"], ["data.weights are all 0"]),
        (["reward.format_weight=0.6", "reward.length_weight=0.5"], ["0.6", "0.5", "1.1"]),
        (["reward.length_weight=0.1"], ["length_bands is empty"]),
        (["reward.length_bands.a=[1, 3, 2, 4]"], ["reward.length_bands.a", "[1.0, 3.0, 2.0, 4.0]"]),
        (["algorithm.entropy.bands.a=[0.6, 0.2]"], ["entropy.bands.a is [0.6, 0.2]"]),
        (["algorithm.entropy.coefficient=0.02"], ["bands is empty"]),
        (["optimizer.betas=[0.9, 1]"], ["optimizer.betas has 1.0"]),
        (["optimizer.lr_scale.x=-2"], ["optimizer.lr_scale.x is -2.0"]),
        (["evaluate.stop_at=0.5", "evaluate.every=5"], ["stop_at=0.5", "evaluate.data=''"]),
        (["run.folder="], ["run.folder is empty"]),
        (["schedules.optimizer.ls={kind: constant}"], ["unknown 'optimizer.ls'", "did you mean 'optimizer.lr'"]),
        (
            ["schedules.optimizer.eps={kind: constant}"],
            ["optimizer.eps is read once", "these can change: ", "optimizer.lr"],
        ),
        (["schedules.optimizer.lr_scale.x={kind: constant}"], ["optimizer.lr_scale.x is read once"]),
        (["schedules.train.steps={kind: constant}"], ["train.steps is read once"]),
        (["schedules.algorithm.kl={kind: constant}"], ["algorithm.kl is a section"]),
        (
            ["schedules.algorithm.kl.by_task={kind: constant}"],
            ["is a mapping", "an entry of it, algorithm.kl.by_task.NAME"],
        ),
        (["schedules.algorithm.entropy.bands.a={kind: constant}"], ["bands.a is a list of 2", "one number"]),
        (["schedules.algorithm.loss.kind={kind: constant}"], ["algorithm.loss.kind is str", "one number"]),
        (["schedules.reward.length_only_if_correct={kind: constant}"], ["is bool", "one number"]),
        (["schedules.optimizer.lr={start: 1}"], ["schedules.optimizer.lr has kind None"]),
    ],
)
def test_a_misfit_is_said_with_its_values(overrides, parts):
    with pytest.raises(ConfigError) as error:
        check(load(None, overrides))
    for part in parts:
        assert part in str(error.value)


def test_all_misfits_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        check(load(None, ["train.steps=0", "rollout.temperature=0", "parallel.tensor=0"]))
    assert str(error.value).count("\n- ") == 3


def test_a_command_names_the_settings_it_needs():
    with pytest.raises(ConfigError, match=r"data\.train is empty"):
        require(load(None, ["model.path=x"]), "model.path", "data.train")
    require(load(None, ["model.path=x", "data.train=y"]), "model.path", "data.train")


def test_settings_of_tasks_that_the_data_lacks_are_said() -> None:
    config = load(
        None,
        [
            "reward.length_bands={count: [0, 1, 2, 3], cuont: [0, 1, 2, 3]}",
            "algorithm.entropy.bands={read: [0.2, 0.6]}",
            "algorithm.kl.by_task={box: 0.1}",
        ],
    )
    first, second = tasks_not_there(config, ("box", "count"))
    assert first == "reward.length_bands names cuont, of which the data has nothing; its tasks are box, count"
    assert "algorithm.entropy.bands names read" in second
