"""A whole run on shards with videos, images and neither: engine and trainer agree on the log-prob of every token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.run_folder import Inputs, prepare, records, run, train, write_config
from tests.tiny import make_tiny, png

SAMPLES = 12


def make_inputs(root: Path) -> Inputs:
    """A tiny model, and shards in which every third sample has a video, and every third of those an image too."""
    made = Inputs(root)
    make_tiny(made.model)
    images = made.raw / "images"
    images.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for number in range(SAMPLES):
        names = [f"{number}-{frame}.png" for frame in range(number % 3 + 2)]
        for frame, name in enumerate(names):
            (images / name).write_bytes(png((64, 32), 10 * number + frame))
        line = {"key": f"count-{number}", "task": "count", "prompt": "How many digits?", "images": [], "answer": "3"}
        if number % 3 == 0:
            line["videos"] = [{"frames": names, "fps": 2}]
        if number % 3 == 1 or number % 9 == 0:
            line["images"] = names[:1]
        lines.append(line)
    (made.raw / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for out in (made.train, made.heldout):
        prepare(made.raw / "data.jsonl", images, out)
    return made


@pytest.mark.slow
def test_a_run_on_videos(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", make_inputs(tmp_path), data={"prompts_per_step": 6})
    run(train(config, "parallel.tensor=2"), 2, tmp_path / "out").ok()
    steps = records(tmp_path / "run")
    assert len(steps) == 3
    assert all(step["mismatch_max"] < 1e-4 and step["grad_norm"] > 0.1 for step in steps)
    assert {line["key"] for line in records(tmp_path / "run", "rollouts.jsonl")} == {
        f"count-{n}" for n in range(SAMPLES)
    }
