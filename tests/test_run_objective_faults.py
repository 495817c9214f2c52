"""What an objective cannot use, at run level: refused before anything is written, or left out, counted and survived."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlrl.algorithms import advantages
from megatron_vlrl.config.load import load
from megatron_vlrl.errors import ConfigError
from megatron_vlrl.loop import train as train_here
from tests.mixed_answers import ENGINE, TASKS, write_shards
from tests.run_folder import (
    Inputs,
    inputs,  # noqa: F401 - a fixture
    records,
    run,
    train,
    write_config,
)

pytestmark = pytest.mark.slow

SAMPLES, WANTED = 4, 4  # responses to a prompt, groups of a step


@pytest.fixture
def config(inputs: Inputs, tmp_path: Path):  # noqa: F811
    """Settings of a run without evaluation on the samples of a script, for as many steps as it fills."""

    def write(script: str, *, steps: int = 0, **algorithm: Any) -> Path:
        return write_config(
            tmp_path / "run.yaml",
            inputs,
            data={"train": str(write_shards(tmp_path / "data", inputs, script)), "prompts_per_step": WANTED},
            rollout={"engine": ENGINE, "samples_per_prompt": SAMPLES, "max_new_tokens": 6},
            reward={"length_weight": 0.0},
            algorithm=algorithm,
            optimizer={"lr": 1.0e-3, "weight_decay": 0.1},
            train={"steps": steps or len(script) // WANTED},
            evaluate={"data": ""},
        )

    return write


SCHEDULED = "schedules.algorithm.loss.options.clip_high={kind: linear, start: 0.2, end: -0.2, steps: 2}"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["algorithm.loss.kind=ppo_clp"], ["algorithm.loss.kind", "'ppo_clp'", "did you mean 'ppo_clip'"]),
        (["algorithm.loss.options.clip_hgh=0.3"], ["algorithm.loss.options of ppo_clip", "did you mean 'clip_high'"]),
        (["algorithm.loss.options.clip_c=3.0"], ["algorithm.loss.options of ppo_clip", "'clip_c'"]),
        (["algorithm.loss.options.clip_low=-0.1"], ["clip_low", "-0.1"]),
        (["algorithm.loss.importance_cap=0.5"], ["algorithm.loss.importance_cap is 0.5"]),
        (["algorithm.advantage.kind=grop"], ["algorithm.advantage.kind", "did you mean 'grpo'"]),
        (["algorithm.advantage.options.scop=task"], ["options of g2rpo", "did you mean 'scope'"]),
        (["algorithm.advantage={kind: ema_grpo, options: {decay: 1.0}}"], ["decay", "1.0"]),
        (["algorithm.advantage={kind: ema_grpo, options: {variant: papr}}"], ["variant", "'papr'", "paper"]),
        (["algorithm.advantage={kind: ema_grpo, options: {state: {}}}"], ["`state` is kept by the run"]),
        (["algorithm.filter.rule=stdd"], ["algorithm.filter.rule", "'stdd'", "'std'"]),
        (["algorithm.kl.coefficient=0.1"], ["coefficient of 0.1", "reference 'frozen' or 'ema'"]),
        (["algorithm.kl.by_task.count=0.1"], ["coefficient of 0.1", "reference 'frozen' or 'ema'"]),
        (["algorithm.kl.decay=1.5"], ["algorithm.kl.decay is 1.5"]),
        (["algorithm.entropy.bands.count=[0.6, 0.2]"], ["algorithm.entropy.bands.count", "[0.6, 0.2]"]),
        (["reward.length_bands.count=[9, 1, 2, 3]"], ["reward.length_bands.count", "ascending"]),
        (["rollout.engine=demonstrations"], ["no sampler's log-probs", "importance=token_tis"]),
        (
            ["schedules.algorithm.kl.coeficient={kind: constant, value: 0}"],
            ["schedules", "did you mean 'algorithm.kl.coefficient'"],
        ),
        (["schedules.train.steps={kind: constant, value: 3}"], ["train.steps is read once"]),
        (["train.steps=4", SCHEDULED], ["step 1, with algorithm.loss.options.clip_high=0 as scheduled", "clip_high"]),
    ],
)
def test_what_no_objective_can_use_is_refused_before_anything_is_written(tmp_path, inputs, overrides, told):  # noqa: F811
    with pytest.raises(ConfigError) as error:
        train_here(load(write_config(tmp_path / "run.yaml", inputs), overrides))
    for text in told:
        assert text in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_every_rank_says_why_it_does_not_start(tmp_path, inputs):  # noqa: F811
    config = write_config(tmp_path / "run.yaml", inputs)
    end = run(train(config, "parallel.data=2", "algorithm.loss.kind=ppo_clp"), 2, tmp_path / "out")
    assert end.codes == [2, 2]
    assert end.err.count("did you mean 'ppo_clip'?") == 2
    assert "Traceback" not in end.err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["logs"]


def test_rollouts_are_ranked_by_a_metadata_field(config, tmp_path):
    """Position by position the tasks take turns, the field changes every second time."""
    run(train(config("MMMM", advantage={"task_key": "family", "options": {"scope": "task"}})), 1, tmp_path / "out").ok()
    lines = records(tmp_path / "run", "rollouts.jsonl")
    rewards = [rollout["total"] for line in lines for rollout in line["rollouts"]]
    found = [rollout["advantage"] for line in lines for rollout in line["rollouts"]]
    groups = [line["key"] for line in lines for _ in line["rollouts"]]
    by_field = ["even"] * 2 * SAMPLES + ["odd"] * 2 * SAMPLES
    by_task = [line["task"] for line in lines for _ in line["rollouts"]]
    assert found == advantages(rewards, by_field, groups, scope="task").values.tolist()
    assert found != advantages(rewards, by_task, groups, scope="task").values.tolist()


def test_a_sample_without_that_field_stops_every_rank(config, tmp_path):
    """It is the second data rank's; the first has nothing to complain of."""
    argv = train(config("MMMMM?MM", advantage={"task_key": "family"}), "parallel.data=2")
    end = run(argv, 2, tmp_path / "out")
    assert end.codes == [2, 2]
    told = "algorithm.advantage.task_key is 'family', but sample '005' has no such metadata field; it has []"
    assert end.err.count(told) == 2
    assert "Traceback" not in end.err
    assert [step["step"] for step in records(tmp_path / "run")] == [1]


UNIFORM = {
    "groups of one": ("MMMMMMMM", ["rollout.samples_per_prompt=1"]),
    "all right": ("RRRRRRRR", ["algorithm.advantage.kind=ema_grpo"]),
    "all filtered": ("RWRWRRRRWWWWWWRR", ["algorithm.filter={rule: std, refill_rounds: 1}"]),
}


@pytest.mark.parametrize("case", UNIFORM)
def test_a_run_without_any_group_that_differs_leaves_the_weights(config, inputs, tmp_path, case):  # noqa: F811
    """Not even weight decay moves them."""
    script, overrides = UNIFORM[case]
    run(train(config(script, steps=2), *overrides), 1, tmp_path / "out").ok()
    steps = records(tmp_path / "run")
    assert [step["skipped"] for step in steps] == ["no group has rewards that differ"] * 2
    assert [step["updates"] for step in steps] == [0, 0]
    uniform = {} if case == "all filtered" else {f"uniform/{task}": 1.0 for task in TASKS}
    assert all({n: v for n, v in step.items() if n.startswith("uniform/")} == uniform for step in steps)
    after, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run/hf", inputs.model))
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


FAULTS = "MXNI-SMSXNI-MSSM"  # a step of which every verifier fails is among them


def _absent(step: dict[str, Any]) -> set[str]:
    """What has no number; metrics.jsonl says null."""
    return {name for name, value in step.items() if value is None} - {"skipped"}


def test_verifiers_that_fail_are_left_out_and_counted(config, tmp_path):
    """On two ranks that share the answers' scoring; only a mean of nothing is no number."""
    run(train(config(FAULTS), "parallel.tensor=2"), 2, tmp_path / "out").ok()
    steps = records(tmp_path / "run")
    assert [step["skipped"] is None for step in steps] == [True, True, False, True]
    for step in steps:
        lines = [line for line in records(tmp_path / "run", "rollouts.jsonl") if line["step"] == step["step"]]
        for number, task in enumerate(TASKS):
            rollouts = [rollout for line in lines[number::2] for rollout in line["rollouts"]]
            failed = [rollout for rollout in rollouts if rollout["failure"]]
            assert step[f"failed/{task}"] == len(failed) / len(rollouts)
            assert step["counts"][f"reward/{task}"] == len(rollouts) - len(failed)
            assert all(rollout["advantage"] == 0.0 and rollout["total"] is None for rollout in failed)
            assert all(math.isfinite(rollout["advantage"]) for rollout in rollouts)
        assert all(step["counts"][name] == 0 for name in _absent(step))
    accuracy, rewards = f"accuracy/{TASKS[1]}", [f"reward/{task}" for task in TASKS]
    assert [_absent(step) for step in steps] == [{rewards[1], accuracy}, set(), {"reward", *rewards}, set()]
    told = [r["failure"] for line in records(tmp_path / "run", "rollouts.jsonl") for r in line["rollouts"]]
    assert {item["message"].partition(": ")[2] for item in told if item} == {
        "RuntimeError: this verifier is broken",
        "ZeroDivisionError: an odd sum",
        *(f"ValueError: accuracy {value} is not in [0, 1]" for value in ("nan", "inf", "-1.0")),
    }


def test_groups_whose_verifier_fails_are_filtered(config, tmp_path):
    """Of those that fail in part, the answers that were judged decide."""
    run(train(config(FAULTS, steps=2, filter={"rule": "std", "refill_rounds": 1})), 1, tmp_path / "out").ok()
    first, second = records(tmp_path / "run")
    trained = [int(line["key"]) for line in records(tmp_path / "run", "rollouts.jsonl")]
    assert {FAULTS[position] for position in trained} == {"M", "S"}
    assert {position for position, letter in enumerate(FAULTS) if letter == "M"} <= set(trained)
    assert first["filter/neither"] >= 5
    assert all(not _absent(step) and step["grad_norm"] > 0 for step in (first, second))


def test_averages_of_another_variant_are_refused(config, tmp_path):
    settings = config("MMMMMMMM", advantage={"kind": "ema_grpo", "options": {"variant": "paper"}})
    run(train(settings, "train.steps=1"), 1, tmp_path / "out").ok()
    other = ["run.resume=auto", "algorithm.advantage.options.variant=onethinker"]
    end = run(train(settings, *other), 1, tmp_path / "out")
    assert end.codes == [2]
    assert "was it made by the other variant? Resume with that one" in end.err
