"""The run state goes through JSON unchanged, and never into another model's run."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megatron_vlrl.checkpoint.state import RunState, differences, summary
from megatron_vlrl.config.schema import Config, OptimizerConfig
from megatron_vlrl.errors import CheckpointError
from tests.spec import SPEC


def make_state(**changed) -> RunState:
    fields = {
        "step": 12,
        "updates": 23,
        "cursor": {"epoch": 1, "position": 960, "tasks": {"count": [1, 2]}},
        "algorithm": {"baseline": 0.1},
        "model": summary(SPEC),
        "config": summary(Config()),
    }
    return RunState(**{**fields, **changed})


def test_it_comes_back_from_json_as_it_was():
    state = make_state()
    raw = json.loads(json.dumps(state.to_dict()))
    assert RunState.from_dict(raw, model=summary(SPEC)) == state


def test_another_model_is_refused_and_the_difference_named():
    other = dataclasses.replace(SPEC, text=dataclasses.replace(SPEC.text, layers=6, mrope_section=(2, 3, 3)))
    with pytest.raises(CheckpointError) as error:
        RunState.from_dict(make_state().to_dict(), model=summary(other))
    assert "text.layers: was 4, now 6" in str(error.value)
    assert "text.mrope_section: was [4, 2, 2], now [2, 3, 3]" in str(error.value)
    assert "hidden_size" not in str(error.value)


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_another_version_is_refused(version):
    with pytest.raises(CheckpointError, match=f"version {version!r}.*reads 1"):
        RunState.from_dict({**make_state().to_dict(), "version": version}, model=summary(SPEC))


def test_a_missing_or_unknown_field_is_refused():
    raw = make_state().to_dict()
    with pytest.raises(CheckpointError, match="surplus"):
        RunState.from_dict({**raw, "surplus": 1}, model=summary(SPEC))
    del raw["cursor"]
    with pytest.raises(CheckpointError, match="cursor"):
        RunState.from_dict(raw, model=summary(SPEC))


@pytest.mark.parametrize("value", [{1: "a"}, {"a": (1, 2)}, {"a": float("nan")}, {"a": {1, 2}}, {"a": b"x"}])
def test_what_json_would_change_is_refused(value):
    with pytest.raises(CheckpointError, match="cursor of the run state"):
        make_state(cursor=value).to_dict()


def test_changed_settings_are_named_one_by_one():
    now = dataclasses.replace(Config(), optimizer=OptimizerConfig(lr=1e-5, lr_scale={"model.visual.*": 0.1}))
    assert differences(summary(Config()), summary(now)) == [
        "optimizer.lr: was 1e-06, now 1e-05",
        "optimizer.lr_scale: was {}, now absent",
        "optimizer.lr_scale.model.visual.*: was absent, now 0.1",
    ]
    assert differences(summary(now), summary(now)) == []
