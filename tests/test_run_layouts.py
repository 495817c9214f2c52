"""Whole training runs, in one process and cut in each way: what they leave behind, and that they are the same run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.run_folder import (
    Ended,
    Inputs,
    cli,
    differences,
    ended,
    folder_bytes,
    inputs,  # noqa: F401 - a fixture
    records,
    run,
    train,
    write_config,
)

LAYOUTS = {
    "tensor=2": ["parallel.tensor=2"],
    "one process": [],
    "data=2": ["parallel.data=2"],
    "pipeline=2": ["parallel.pipeline=2"],
}
STEPS = 3


@pytest.fixture(scope="module")
def runs(inputs: Inputs, tmp_path_factory):  # noqa: F811
    """Run a layout once: (folder, how it ended). The default one is started as a user does."""
    done: dict[str, tuple[Path, Ended]] = {}

    def get(layout: str) -> tuple[Path, Ended]:
        if layout not in done:
            root = tmp_path_factory.mktemp("layout")
            config = write_config(root / "run.yaml", inputs, checkpoint={"every": 2, "keep": 2})
            argv = train(config, *LAYOUTS[layout])
            if layout == "tensor=2":
                done[layout] = root / "run", ended(cli(argv))
            else:
                done[layout] = root / "run", run(argv, 2 if LAYOUTS[layout] else 1, root / "out")
        return done[layout]

    return get


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("data=2", "pipeline=2")]


@pytest.mark.parametrize("layout", ["tensor=2", "one process", *SLOW])
def test_a_run_leaves_everything_it_promises(runs, layout):
    folder, end = runs(layout)
    end.ok()
    assert {path.name for path in folder.iterdir()} == {
        *("checkpoints", "config.yaml", "evaluation.jsonl", "hf", "logs", "metrics.jsonl", "report.html"),
        *("rollouts", "rollouts.jsonl", "tensorboard"),
    }
    steps = records(folder)
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert all(step["mismatch_max"] < 1e-4 for step in steps)
    assert all(step["grad_norm"] > 0.1 for step in steps)
    assert [(item["step"], item["label"]) for item in records(folder, "evaluation.jsonl")] == [
        (0, "before"),
        (STEPS, "after"),
    ]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "latest",
        "step-00000002",
        "step-00000003",
    ]
    assert any((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert all((folder / name).is_file() for line in records(folder, "rollouts.jsonl") for name in line["images"])
    assert "<svg" in (folder / "report.html").read_text()


PICTURE = (
    *("reward", "accuracy", "format", "length", "failed", "response_length", "uniform", "tied", "effective_n"),
    *("advantage", "advantage_var", "advantage_max", "advantage_p05", "advantage_p50", "advantage_p95"),
    *("decided_accuracy", "decided_format", "decided_length", "entropy", "clip_fraction", "policy_kl"),
    *("mismatch_kl", "importance", "importance_capped", "ratio_p01", "ratio_p99"),
    *("mismatch_ratio_p01", "mismatch_ratio_p99"),
)


def test_every_task_has_its_picture_in_every_record(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = runs("tensor=2")
    named = {f"{family}/{task}" for family in PICTURE for task in ("box", "count", "pick", "read", "sum")}
    for step in records(folder):
        assert not {name for name in named if step.get(name) is None}
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert not named - set(events.Tags()["scalars"])
    page = (folder / "report.html").read_text()
    assert not [heading for heading in ("ranks decided by", "effective N", "mismatch KL") if heading not in page]


def test_the_screen_shows_a_line_a_step_and_ends_with_the_table(runs):
    _, end = runs("tensor=2")
    lines = end.out.splitlines()
    shown = [line.partition("|")[0].strip() for line in lines if line.startswith(tuple("0123456789"))]
    assert shown == [f"{step}/{STEPS}" for step in range(1, STEPS + 1)]
    table = [line.split()[0] for line in lines[-8:]]
    assert table[:5] == ["box", "count", "pick", "read", "sum"]
    assert table[6] == "mean"
    assert "Traceback" not in end.err


def test_the_exported_model_is_a_hugging_face_folder_that_learned(runs, inputs):  # noqa: F811
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder, _ = runs("tensor=2")
    assert type(AutoProcessor.from_pretrained(folder / "hf")).__name__ == "Qwen3VLProcessor"
    after, before = (AutoModelForImageTextToText.from_pretrained(path) for path in (folder / "hf", inputs.model))
    moved = [name for name, weight in after.named_parameters() if not torch.equal(weight, before.get_parameter(name))]
    assert len(moved) == len(list(after.named_parameters()))


@pytest.mark.parametrize("layout", ["one process", *SLOW])
def test_every_layout_is_the_same_run(runs, layout):
    """Every step, not the first alone: no token has flipped. Losses are sums of +A and -A that cancel to rounding."""
    ours, theirs = records(runs(layout)[0]), records(runs("tensor=2")[0])
    for one, other in zip(ours, theirs, strict=True):
        drift = {name: step.pop("mismatch_max") for name, step in (("ours", one), ("theirs", other))}
        assert max(drift.values()) < 1e-4
        for step in (one, other):  # how even the work is: the one thing that a layout may change
            assert step.pop("balance/before") >= step.pop("balance/after") >= 1.0
        assert not differences(one, other, relative=1e-4, absolute=1e-6)
    assert records(runs(layout)[0], "evaluation.jsonl") == records(runs("tensor=2")[0], "evaluation.jsonl")


def test_convert_gives_the_exported_model_bit_by_bit(runs, tmp_path):
    folder, _ = runs("tensor=2")
    newest = folder / "checkpoints/step-00000003"
    run(["convert", "--from", str(newest), "--to-hf", str(tmp_path / "hf")], 1, tmp_path / "out").ok()
    assert folder_bytes(tmp_path / "hf") == folder_bytes(folder / "hf")
    earlier = folder / "checkpoints/step-00000002"
    run(["convert", "--from", str(earlier), "--to-hf", str(tmp_path / "hf")], 1, tmp_path / "out").ok()
    changed = {
        name for name, data in folder_bytes(tmp_path / "hf").items() if data != folder_bytes(folder / "hf")[name]
    }
    assert changed == {"model.safetensors"}


def test_the_settings_written_by_a_run_reproduce_it(runs, tmp_path):
    folder, _ = runs("one process")
    run(train(folder / "config.yaml", f"run.folder={tmp_path / 'again'}"), 1, tmp_path / "out").ok()
    assert records(tmp_path / "again") == records(folder)
    assert records(tmp_path / "again", "rollouts.jsonl") == records(folder, "rollouts.jsonl")
    assert folder_bytes(tmp_path / "again/hf") == folder_bytes(folder / "hf")


def test_the_checkpoints_manifest_names_the_layout(runs):
    manifest = json.loads((runs("tensor=2")[0] / "checkpoints/step-00000003/MANIFEST.json").read_text())
    assert manifest["layout"] == {"tensor": 2, "pipeline": 1, "data": 1, "sequence": True, "virtual": 1, "expert": 1}
