"""What goes wrong at run level: said with its reason and the right exit code, or skipped, counted and survived."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.run_folder import (
    Inputs,
    cli,
    ended,
    folder_bytes,
    inputs,  # noqa: F401 - a fixture
    prepare,
    records,
    run,
    train,
    wait_for,
    write_config,
)

BROKEN = "train-read-000006"  # the key of the sample whose image is damaged: at position 6, so of data rank 0 of 2


@pytest.fixture
def config(inputs: Inputs, tmp_path: Path) -> Path:  # noqa: F811
    """A run of one step without evaluation."""
    return write_config(tmp_path / "run.yaml", inputs, train={"steps": 1}, evaluate={"data": ""})


@pytest.fixture(scope="module")
def broken(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The shards, but for one image whose pixels are cut off; its first bytes still say PNG."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(inputs.raw / "images", folder / "images")
    image = folder / f"images/{BROKEN}.png"
    image.write_bytes(image.read_bytes()[:100])
    prepare(inputs.raw / "train.jsonl", folder / "images", folder / "shards")
    return folder / "shards"


def _log(config: Path, rank: int = 0) -> str:
    return (config.parent / f"run/logs/rank-{rank}.log").read_text()


@pytest.mark.parametrize(
    ("overrides", "size", "told"),
    [
        (["parallel.tensor=3"], 3, ["parallel.tensor=3 does not divide 4 attention heads, 2 key/value heads"]),
        (
            ["parallel.pipeline=3"],
            3,
            ["parallel.pipeline=3 x virtual_pipeline=1 does not divide 4 layers", "[1, 2, 4]"],
        ),
        (["parallel.tensor=2"], 3, ["tensor 2 x pipeline 1 x data 1 = 2, but 3 processes were started"]),
        (["model.freeze=[model.vision.*]"], 1, ["model.freeze: 'model.vision.*' matches no parameter"]),
        (["algorithm.advantage.options.scop=task"], 1, ["scop"]),
        (["reward.length_bands.count=[9, 1, 2, 3]"], 1, ["reward.length_bands.count"]),
        (["model.path=/nowhere"], 1, ["/nowhere"]),
        (["data.train=/nowhere"], 1, ["/nowhere", "megatron-vlrl data prepare"]),
        (["data.weights.cuont=1"], 1, ["cuont", "did you mean 'count'?"]),
    ],
)
def test_what_cannot_run_is_an_error_with_its_reason(config, tmp_path, overrides, size, told):
    end = run(train(config, *overrides), size, tmp_path / "out")
    assert end.codes == [2] * size, end.err
    assert "Traceback" not in end.err
    assert all(text in end.err for text in told), end.err
    assert not (config.parent / "run/checkpoints").exists()


@pytest.mark.slow
def test_degrees_that_do_not_fit_are_told_once_by_the_launcher(config):
    end = ended(cli(train(config, "parallel.tensor=3")))
    assert end.codes == [2]
    assert end.err.startswith("error: rank ")
    assert end.err.count("4 attention heads") == 1
    assert "Traceback" not in end.err


def test_a_damaged_image_is_skipped_counted_and_named(config, broken, tmp_path):
    overrides = [f"data.train={broken}", "train.steps=5"]
    run(train(config, *overrides), 1, tmp_path / "out").ok()
    steps, lines = records(config.parent / "run"), records(config.parent / "run", "rollouts.jsonl")
    skipped_at = next(step for step in range(1, 6) if sum(line["step"] == step for line in lines) == 9)
    assert [step["bad_samples"] for step in steps] == [float(step["step"] >= skipped_at) for step in steps]
    assert len(lines) == 49
    assert BROKEN not in {line["key"] for line in lines}
    assert _log(config).count(f"skipped sample {BROKEN}") == 1


@pytest.mark.parametrize("size", [1, 2])
def test_too_many_damaged_images_end_every_rank_with_a_summary(config, broken, tmp_path, size):
    """Of two data ranks one alone meets the image; both say the same."""
    overrides = [f"data.train={broken}", "train.steps=5", "data.max_bad_samples=0", f"parallel.data={size}"]
    end = run(train(config, *overrides), size, tmp_path / "out")
    assert end.codes == [2] * size
    assert end.err.count("1 samples could not be used, more than data.max_bad_samples=0 allows") == size
    assert end.err.count(f"  {BROKEN}: ") == size


@pytest.mark.slow
def test_prompts_that_are_too_long_are_skipped_and_counted(config, tmp_path):
    run(train(config, "train.steps=4"), 1, tmp_path / "out").ok()
    whole = records(config.parent / "run", "rollouts.jsonl")
    limit = 35
    shutil.rmtree(config.parent / "run")
    end = run(train(config, "train.steps=4", f"data.max_prompt_tokens={limit}"), 1, tmp_path / "out").ok()
    step, lines = records(config.parent / "run")[-1], records(config.parent / "run", "rollouts.jsonl")
    missing = {line["key"] for line in whole} - {line["key"] for line in lines}
    assert 0 < len(missing) < len(whole)
    assert step["bad_samples"] == len(missing)
    assert all(f"skipped sample {key}: its prompt has " in _log(config) for key in missing)
    shutil.rmtree(config.parent / "run")
    end = run(
        train(config, "train.steps=4", f"data.max_prompt_tokens={limit}", "data.max_bad_samples=1"), 1, tmp_path / "out"
    )
    assert end.codes == [2]
    assert "more than data.max_bad_samples=1 allows" in end.err
    assert f"over data.max_prompt_tokens = {limit}" in end.err


def _rank_of(pid: int) -> str | None:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((text.decode().partition("=")[2] for text in variables if text.startswith(b"RANK=")), None)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run_and_is_named(config):
    launcher = cli(train(config, "parallel.tensor=2", "train.steps=100000", "checkpoint.every=0"))
    metrics = config.parent / "run/metrics.jsonl"
    wait_for(metrics.exists, lambda: launcher.poll() is None)
    ranks = {_rank_of(pid): pid for pid in _children(launcher.pid)}
    os.kill(ranks["1"], signal.SIGKILL)
    begin = time.monotonic()
    end = ended(launcher, timeout=60)
    assert time.monotonic() - begin < 30  # promised
    assert end.codes == [1]
    assert "error: rank 1 was killed by SIGKILL" in end.err
    assert not Path(f"/proc/{ranks['0']}").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 11 megabytes: a checkpoint takes 4.5, so the third does not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=11m", "tmpfs", str(disk)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"no small disk can be made: {' '.join(command)}: {result.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_is_an_error_that_leaves_the_last_checkpoint(config, small_disk, tmp_path, size):
    run_folder = [f"run.folder={small_disk / 'run'}", "run.resume=auto", f"parallel.tensor={size}"]
    argv = train(config, *run_folder, "train.steps=4", "checkpoint={every: 1, keep: 4}", "observe.export=false")
    end = run(argv, size, tmp_path / "out")
    assert end.codes == [2] * size, end.err
    assert "the checkpoint of step 3 could not be written" in end.err
    assert "No space left on device" in end.err
    checkpoints = small_disk / "run/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000001", "step-00000002"]
    # With room again it goes on from there.
    shutil.copytree(small_disk / "run", tmp_path / "roomy")
    newest = folder_bytes(checkpoints / "step-00000002")
    run([*argv, f"run.folder={tmp_path / 'roomy'}"], size, tmp_path / "out").ok()
    assert [step["step"] for step in records(tmp_path / "roomy")] == [1, 2, 3, 4]
    assert folder_bytes(tmp_path / "roomy/checkpoints/step-00000002") == newest


@pytest.mark.parametrize(("prompts", "size"), [pytest.param(1, 1, marks=pytest.mark.slow), (2, 2)])
@pytest.mark.slow
def test_a_step_whose_prompts_are_all_bad_is_passed(config, broken, tmp_path, prompts, size):
    """One prompt a rank: with two ranks one of them has nothing in that step, with one the whole step is empty."""
    steps = 40 // prompts
    sizes = [
        f"data.prompts_per_step={prompts}",
        f"parallel.data={size}",
        f"train.steps={steps}",
        "observe.export=false",
    ]
    run(train(config, f"data.train={broken}", *sizes), size, tmp_path / "out").ok()
    told = records(config.parent / "run")
    assert [step["step"] for step in told] == list(range(1, steps + 1))
    assert told[-1]["bad_samples"] == 1
    counts = [step["counts"]["reward"] for step in told]
    assert sorted(counts) == [4 * prompts - 4] + [4 * prompts] * (steps - 1)
    at = counts.index(4 * prompts - 4)
    assert told[at]["bad_samples"] == 1
    if size == 1:
        assert told[at]["skipped"] == "no group has rewards that differ"
    assert told[-1]["updates"] > steps // 2
