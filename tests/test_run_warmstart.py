"""From nothing to a model that answers: supervised warm start, its early end, and what is measured of the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.run_folder import (
    TASKS,
    Inputs,
    folder_bytes,
    inputs,  # noqa: F401 - a fixture
    prepare,
    records,
    run,
    train,
    write_config,
)

WARM = {
    "rollout": {"engine": "demonstrations", "samples_per_prompt": 1, "max_new_tokens": 48},
    "algorithm": {
        "advantage": {"kind": "ones"},
        "loss": {"kind": "nll", "aggregation": "token_mean", "importance": "none"},
    },
    "optimizer": {"lr": 4.0e-3, "betas": [0.9, 0.98], "warmup_steps": 5},
    "reward": {"length_weight": 0.0},
}
STOP_AT = 0.3


@pytest.fixture(scope="module")
def warm(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The settings of a warm start that has run; it may end once three in ten training items are right."""
    root = tmp_path_factory.mktemp("warm")
    gate = {"data": str(inputs.train), "per_task": 8, "every": 10, "start": 20, "stop_at": STOP_AT}
    config = write_config(
        root / "run.yaml",
        inputs,
        **WARM,
        run={"folder": str(root / "run"), "resume": "auto"},
        train={"steps": 300},
        evaluate=gate,
        observe={"rollouts_every": 50, "rollouts_kept": 2},
    )
    run(train(config), 1, root / "out").ok()
    return config


def test_imitation_lowers_the_loss_and_ends_early(warm):
    steps = records(warm.parent / "run")
    assert steps[-1]["nll"] < 0.3 * steps[0]["nll"]
    assert all("mismatch_max" not in step for step in steps)  # nothing was sampled
    evaluations = records(warm.parent / "run", "evaluation.jsonl")
    means = [sum(task["accuracy"] for task in item["tasks"].values()) / len(TASKS) for item in evaluations]
    assert [item["label"] for item in evaluations] == ["before", *["during"] * (len(means) - 2), "after"]
    assert steps[-1]["step"] == evaluations[-1]["step"] < 300
    assert [mean >= STOP_AT for mean in means] == [False] * (len(means) - 2) + [True] * 2


def test_a_run_that_ended_early_is_not_continued(warm, tmp_path):
    before = folder_bytes(warm.parent / "run")
    run(train(warm), 1, tmp_path / "out").ok()
    after = folder_bytes(warm.parent / "run")
    assert {name.partition("/")[0] for name in after if after[name] != before.get(name)} == {"logs", "tensorboard"}


def test_evaluate_says_the_same_from_one_process_and_from_two(warm, inputs, tmp_path):  # noqa: F811
    argv = ["evaluate", "--model", str(warm.parent / "run/hf"), "--data", str(inputs.train)]
    argv += [f"run.folder={tmp_path}", "evaluate.per_task=7", "rollout.max_new_tokens=48"]
    one = run(argv, 1, tmp_path / "one").ok().out
    two = run([*argv, "parallel.data=2"], 2, tmp_path / "two").ok().out
    assert one == two
    rows = [line.split() for line in one.splitlines()]
    assert [row[0] for row in rows] == ["task", *sorted(TASKS), "mean"]
    assert [int(row[-1]) for row in rows[1:]] == [7] * len(TASKS) + [7 * len(TASKS)]
    accuracies = [float(row[1]) for row in rows[1:]]
    assert accuracies[-1] == pytest.approx(sum(accuracies[:-1]) / len(TASKS), abs=1e-3)
    assert accuracies[-1] > 0.1


def moody_reward(answer: str, gold: Any, meta: Mapping[str, Any]) -> float:
    """A user's verifier that cannot judge some items."""
    if int(gold) >= 3:
        raise RuntimeError(f"cannot judge {answer}")
    return float(answer == gold)


@pytest.fixture(scope="module")
def moody(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The shards, their count task judged by `moody_reward`."""
    folder = tmp_path_factory.mktemp("moody")
    rows = [json.loads(line) for line in (inputs.raw / "train.jsonl").read_text().splitlines()]
    rows = [{**row, "task": MOODY if row["task"] == "count" else row["task"]} for row in rows]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(folder / "data.jsonl", inputs.raw / "images", folder / "shards")
    return folder / "shards"


MOODY = "tests.test_run_warmstart:moody_reward"


@pytest.mark.slow
def test_a_users_reward_that_raises_is_counted_and_learning_goes_on(warm, moody, inputs, tmp_path):  # noqa: F811
    """Reinforcement learning from the warm start, whose answers reach the verifier."""
    config = write_config(
        tmp_path / "run.yaml",
        inputs,
        model={"path": str(warm.parent / "run/hf")},
        data={"train": str(moody)},
        rollout={"max_new_tokens": 24},
        reward={"length_weight": 0.0, "length_bands": {}},
        train={"steps": 4},
        evaluate={"data": ""},
    )
    run(train(config), 1, tmp_path / "out").ok()
    steps, lines = records(tmp_path / "run"), records(tmp_path / "run", "rollouts.jsonl")
    for step in steps:
        own = [line for line in lines if line["step"] == step["step"] and line["task"] == MOODY]
        answers = [(line, rollout) for line in own for rollout in line["rollouts"]]
        failed = [rollout for _, rollout in answers if rollout["failure"]]
        assert step[f"failed/{MOODY}"] == len(failed) / len(answers)
        assert all(rollout["total"] is None and rollout["advantage"] == 0 for rollout in failed)
        for line, rollout in answers:
            assert (rollout["failure"] is not None) == (
                int(line["answer"]) >= 3 and rollout["components"]["format"] == 1
            )
        assert all(step[f"failed/{name}"] == 0 for name in TASKS if name != "count")
        assert step["skipped"] is None
        assert step["mismatch_max"] < 1e-4
    failures = [rollout["failure"] for line in lines for rollout in line["rollouts"] if rollout["failure"]]
    assert all(
        failure["kind"] == "error" and "RuntimeError: cannot judge" in failure["message"] for failure in failures
    )
    assert 0 < len(failures) < len(lines) * 4


@pytest.mark.slow
def test_a_failed_verifier_is_counted_in_a_warm_start_too(moody, inputs, tmp_path):  # noqa: F811
    """There it takes nothing away: a demonstration is imitated whatever its reward."""
    config = write_config(
        tmp_path / "run.yaml", inputs, **WARM, data={"train": str(moody)}, train={"steps": 4}, evaluate={"data": ""}
    )
    run(train(config), 1, tmp_path / "out").ok()
    failed = [step[f"failed/{MOODY}"] for step in records(tmp_path / "run")]
    lines = [line for line in records(tmp_path / "run", "rollouts.jsonl") if line["task"] == MOODY]
    assert sum(failed) / 4 == sum(int(line["answer"]) >= 3 for line in lines) / len(lines) > 0


def test_a_sample_without_demonstration_ends_a_warm_start_with_its_name(inputs, tmp_path):  # noqa: F811
    config = write_config(tmp_path / "run.yaml", inputs, **WARM, train={"steps": 1}, evaluate={"data": ""})
    end = run(train(config, "rollout.max_new_tokens=8"), 1, tmp_path / "out")
    assert end.codes == [2]
    assert "rollout.max_new_tokens is 8" in end.err
    assert "'train-" in end.err
