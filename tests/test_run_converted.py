"""A run that starts from a converted checkpoint is the run that starts from the Hugging Face folder it was made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.run_folder import (
    Inputs,
    folder_bytes,
    inputs,  # noqa: F401 - a fixture
    records,
    run,
    train,
    write_config,
)
from tests.tiny import make_tiny

pytestmark = pytest.mark.slow

LAYOUTS = {"tensor=2": 2, "pipeline=2": 2, "data=2": 2}  # the first is the checkpoint's own


def convert(folder: Path, out: Path, logs: Path) -> Path:
    """As a user does, for two tensor ranks."""
    argv = ["convert", "--from-hf", str(folder), "--to", str(out), "--tensor", "2", "--pipeline", "1"]
    run(argv, 1, logs).ok()
    return out


def config_of(folder: Path, inputs: Inputs, model: Path) -> Path:  # noqa: F811
    return write_config(folder / "run.yaml", inputs, model={"path": str(model)}, train={"steps": 2})


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model like that of `inputs`, with other weights."""
    return make_tiny(tmp_path_factory.mktemp("other") / "model", seed=1)


@pytest.fixture(scope="module")
def checkpoint(other: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    return convert(other, root / "converted", root / "out")


def kept(folder: Path) -> dict[str, bytes]:
    """What must not be touched: all but the logs, which every start adds to."""
    return {name: data for name, data in folder_bytes(folder).items() if not name.startswith("logs/")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_the_run_from_the_folder_bit_by_bit(layout, inputs, other, checkpoint, tmp_path):  # noqa: F811
    """model.path names other weights, so that those of the checkpoint are what the run is of."""
    wanted = train(config_of(tmp_path / "folder", inputs, other), f"parallel.{layout}")
    run(wanted, LAYOUTS[layout], tmp_path / "out").ok()
    before = folder_bytes(checkpoint)
    resumed = train(
        config_of(tmp_path / "checkpoint", inputs, inputs.model), f"parallel.{layout}", f"run.resume={checkpoint}"
    )
    run(resumed, LAYOUTS[layout], tmp_path / "out").ok()
    for name in ("metrics.jsonl", "evaluation.jsonl", "rollouts.jsonl"):
        assert records(tmp_path / "checkpoint/run", name) == records(tmp_path / "folder/run", name), name
    assert [step["step"] for step in records(tmp_path / "checkpoint/run")] == [1, 2]
    assert folder_bytes(tmp_path / "checkpoint/run/hf") == folder_bytes(tmp_path / "folder/run/hf")
    assert folder_bytes(checkpoint) == before


def test_it_is_a_new_run_and_leaves_an_old_one_alone(inputs, checkpoint, tmp_path):  # noqa: F811
    config = config_of(tmp_path, inputs, inputs.model)
    argv = train(config, f"run.resume={checkpoint}", "train.steps=1")
    run(argv, 1, tmp_path / "out").ok()
    before = kept(tmp_path / "run")
    end = run(argv, 1, tmp_path / "out")
    assert end.codes == [2]
    assert "holds step-00000001 of an earlier one; set run.resume=auto" in end.err
    assert kept(tmp_path / "run") == before
    run(train(config, "run.resume=auto"), 1, tmp_path / "out").ok()
    assert [step["step"] for step in records(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("layout", ["tensor=1", "tensor=2"])
def test_a_checkpoint_of_another_model_is_refused(layout, inputs, tmp_path):  # noqa: F811
    small = make_tiny(tmp_path / "small", layers=3)
    checkpoint = convert(small, tmp_path / "converted", tmp_path / "out")
    before = folder_bytes(checkpoint)
    config = config_of(tmp_path, inputs, inputs.model)
    ranks = int(layout[-1])
    end = run(train(config, f"parallel.{layout}", f"run.resume={checkpoint}"), ranks, tmp_path / "out")
    assert end.codes == [2] * ranks
    assert "the checkpoint is of another model: text.layers: was 3, now 4. Set model.path" in end.err
    assert "Traceback" not in end.err
    assert folder_bytes(checkpoint) == before
    assert not kept(tmp_path / "run")
