"""A run killed in the middle of a step goes on as if it never had been: same metrics, same weights, bit by bit."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from tests.run_folder import (
    PAUSE_AT,
    PAUSE_FILE,
    TASKS,
    Inputs,
    Ranks,
    cli,
    differences,
    folder_bytes,
    inputs,  # noqa: F401 - a fixture
    records,
    run,
    train,
    wait_for,
    write_config,
)

STEPS, MINIBATCHES, KILLED_STEP = 5, 2, 4
# In the second of the step's two updates: the first has changed the weights already.
KILLED_CALL = (KILLED_STEP - 1) * MINIBATCHES + 2
LAYOUTS = {"tensor=2": 2, "data=2": 2}


def config_of(folder: Path, inputs: Inputs) -> Path:  # noqa: F811
    """Entropy shaping, the length reward and schedules on, two updates a step, a checkpoint and an evaluation on the
    way."""
    return write_config(
        folder / "run.yaml",
        inputs,
        run={"folder": str(folder / "run"), "resume": "auto"},
        algorithm={
            "loss": {"kind": "tests.run_folder:pausing_ppo"},
            "entropy": {"coefficient": 0.01, "bands": {"count": [0, 1], "read": [4, 5], "box": [6, 7]}},
        },
        reward={
            "length_weight": 0.5,
            "length_unit": "char",
            "length_bands": {task: [0, 40, 50, 90] for task in TASKS},
        },
        train={"steps": STEPS, "minibatches": MINIBATCHES},
        checkpoint={"every": 1, "keep": 3},
        evaluate={"data": str(inputs.heldout), "per_task": 2, "every": 2, "temperature": 1.0},
        schedules={
            "rollout.temperature": {"kind": "linear", "start": 1.5, "end": 0.5},
            "optimizer.weight_decay": {"kind": "piecewise", "points": [[2, 0.0], [4, 0.2]]},
        },
    )


@pytest.fixture(scope="module")
def killed(inputs, tmp_path_factory):  # noqa: F811
    """(uninterrupted run, folder of the same run when it was killed in step 4), for a layout; each made once."""
    done: dict[str, tuple[Path, Path]] = {}

    def get(layout: str) -> tuple[Path, Path]:
        if layout not in done:
            root = tmp_path_factory.mktemp(layout)
            overrides = [f"parallel.{layout}"]
            whole = config_of(root / "whole", inputs)
            run(train(whole, *overrides), LAYOUTS[layout], root / "out").ok()
            interrupted = train(config_of(root / "killed", inputs), *overrides)
            _kill(interrupted, layout, root)
            done[layout] = whole.parent, root / "killed"
        return done[layout]

    return get


def _kill(argv: list[str], layout: str, root: Path) -> None:
    """SIGKILL to every process of a run whose ranks are all inside the loss of step 4."""
    environment = {PAUSE_FILE: str(root / "paused"), PAUSE_AT: str(KILLED_CALL)}
    paused = [root / f"paused-{rank}" for rank in range(LAYOUTS[layout])]
    if layout == "tensor=2":  # as a user runs it: the launcher dies, the ranks must not stay
        launcher = cli(argv, **environment)
        wait_for(lambda: all(path.exists() for path in paused), lambda: launcher.poll() is None)
        launcher.kill()
        launcher.communicate(timeout=30)  # its pipes end when the last rank has ended
        assert launcher.returncode == -signal.SIGKILL
    else:
        ranks = Ranks(argv, LAYOUTS[layout], root / "out", **environment)
        wait_for(
            lambda: all(path.exists() for path in paused),
            lambda: all(process.is_alive() for process in ranks.processes),
        )
        ranks.kill()


def _copy(killed: Path, to: Path) -> Path:
    """The killed run elsewhere; returns the settings that go on with it."""
    shutil.copytree(killed, to)
    config = to / "run.yaml"
    config.write_text(config.read_text().replace(f"folder: {killed}", f"folder: {to}"))
    return config


def _assert_same_run(ours: Path, theirs: Path) -> None:
    for name in ("metrics.jsonl", "evaluation.jsonl", "rollouts.jsonl"):
        assert records(ours / "run", name) == records(theirs / "run", name), name
    assert folder_bytes(ours / "run/hf") == folder_bytes(theirs / "run/hf")


SLOW_DATA = [pytest.param("data=2", marks=pytest.mark.slow)]


@pytest.mark.parametrize("layout", ["tensor=2", *SLOW_DATA])
def test_a_killed_run_ends_as_if_it_never_was(killed, layout, tmp_path):
    whole, stopped = killed(layout)
    assert [step["step"] for step in records(stopped / "run")] == [1, 2, 3]
    config = _copy(stopped, tmp_path / "resumed")
    run(train(config, f"parallel.{layout}"), LAYOUTS[layout], tmp_path / "out").ok()
    _assert_same_run(config.parent, whole)
    assert [step["step"] for step in records(whole / "run")] == list(range(1, STEPS + 1))
    assert [item["step"] for item in records(whole / "run", "evaluation.jsonl")] == [0, 2, 4, 5]
    assert all(step["updates"] == MINIBATCHES * step["step"] for step in records(whole / "run"))
    temperatures = [step["schedule/rollout.temperature"] for step in records(whole / "run")]
    assert temperatures == pytest.approx([1.5, 1.3, 1.1, 0.9, 0.7])
    # The trainer's log-probs are of the temperature that the sampler had.
    assert all(step["mismatch_max"] < 1e-4 for step in records(whole / "run"))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_and_the_step_before_taken(killed, tmp_path):
    whole, stopped = killed("tensor=2")
    config = _copy(stopped, tmp_path / "resumed")
    shard = next((config.parent / "run/checkpoints/step-00000003").glob("__0_0.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    end = run(train(config, "parallel.tensor=2"), 2, tmp_path / "out").ok()
    assert "step-00000003 is damaged and passed over" in end.err
    _assert_same_run(config.parent, whole)


@pytest.mark.slow
def test_another_layout_goes_on_with_the_same_data(killed, tmp_path):
    """The answers, too, are the same here: a sampled token hangs on neither the layout nor the batch."""
    whole, stopped = killed("tensor=2")
    config = _copy(stopped, tmp_path / "resumed")
    run(train(config, "parallel.tensor=1"), 1, tmp_path / "out").ok()
    ours, theirs = (records(folder / "run", "rollouts.jsonl") for folder in (config.parent, whole))
    assert [(line["step"], line["key"]) for line in ours] == [(line["step"], line["key"]) for line in theirs]
    assert len({line["key"] for line in ours}) == 40  # every sample once in the first four steps
    for one, other in zip(records(config.parent / "run"), records(whole / "run"), strict=True):
        assert not differences(one, other, relative=1e-3, absolute=1e-4)


def test_a_finished_run_that_is_started_again_changes_nothing(killed, tmp_path):
    whole, _ = killed("tensor=2")
    config = _copy(whole, tmp_path / "again")
    table = [run(train(config, "parallel.tensor=1"), 1, tmp_path / "out").ok().out]
    _assert_same_run(config.parent, whole)
    before = folder_bytes(config.parent / "run")
    table.append(run(train(config, "parallel.tensor=1"), 1, tmp_path / "out").ok().out)
    after = folder_bytes(config.parent / "run")
    assert {name.partition("/")[0] for name in after if after[name] != before.get(name)} == {"logs", "tensorboard"}
    assert set(before) <= set(after)
    assert table[0] == table[1]
    assert table[0].startswith("task ")


def test_without_resume_an_old_run_is_left_alone(inputs, tmp_path):  # noqa: F811
    config = write_config(tmp_path / "run.yaml", inputs, train={"steps": 1})
    run(train(config), 1, tmp_path / "out").ok()
    before = records(tmp_path / "run")
    end = run(train(config, "train.steps=2"), 1, tmp_path / "out")
    assert end.codes == [2]
    assert "holds step-00000001 of an earlier one; set run.resume=auto" in end.err
    assert records(tmp_path / "run") == before


@pytest.mark.slow
def test_a_finished_run_goes_on_when_more_steps_are_asked_for(inputs, tmp_path):  # noqa: F811
    constant = {"lr": 1.0e-3, "decay": "constant"}  # a decay would depend on the number of steps
    config = write_config(tmp_path / "run.yaml", inputs, run={"folder": str(tmp_path / "run")}, optimizer=constant)
    run(train(config, "train.steps=4", f"run.folder={tmp_path / 'whole'}"), 1, tmp_path / "out").ok()
    run(train(config, "train.steps=2"), 1, tmp_path / "out").ok()
    end = run(train(config, "train.steps=4", "run.resume=auto"), 1, tmp_path / "out").ok()
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert folder_bytes(tmp_path / "run/hf") == folder_bytes(tmp_path / "whole/hf")
    labels = [(item["step"], item["label"]) for item in records(tmp_path / "run", "evaluation.jsonl")]
    assert labels == [(0, "before"), (2, "after"), (4, "after")]
    assert "train.steps: was 2, now 4" in end.err


def test_what_cannot_go_on_is_refused_with_the_reason(killed, tmp_path):
    _, stopped = killed("tensor=2")
    config = _copy(stopped, tmp_path / "resumed")
    before = folder_bytes(config.parent / "run/checkpoints")
    end = run(train(config, "parallel.tensor=1", "run.seed=1"), 1, tmp_path / "out")
    assert end.codes == [2]
    assert "run.seed changed from 0 to 1" in end.err
    end = run(train(config, "parallel.tensor=1", f"run.resume={tmp_path / 'nowhere'}"), 1, tmp_path / "out")
    assert end.codes == [2]
    assert str(tmp_path / "nowhere") in end.err
    assert folder_bytes(config.parent / "run/checkpoints") == before
