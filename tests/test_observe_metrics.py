"""Metrics, records and their readers: what is written, what a resume cuts, what damage is told."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_vlrl.errors import DataError
from megatron_vlrl.observe import jsonl
from megatron_vlrl.observe.metrics import MetricsWriter, read_metrics
from megatron_vlrl.observe.records import (
    EvaluationLog,
    RolloutLog,
    file_name,
    image_suffix,
    read_evaluations,
    read_rollouts,
)
from megatron_vlrl.types import Mean, RewardBreakdown, RewardFailure, ScoredGroup, StepStats
from tests.fake_run import PNG, group, rewards, stats


def _scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def _timeless(record: dict) -> dict:
    return {key: value for key, value in record.items() if key != "time" and not key.startswith("seconds/")}


def test_one_strict_json_line_a_step(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=None)
    means = {"reward/count": Mean(total=3.0, count=4), "accuracy/count": Mean(total=0.0, count=0)}
    scalars = {"grad_norm": float("inf"), "lr": float(np.float32(0.5))}
    writer.write(StepStats(step=7, means=means, scalars=scalars, seconds={"pack": 0.25}, skipped="non-finite"))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert "NaN" not in lines[0]
    assert "Infinity" not in lines[0]
    record = json.loads(lines[0])
    assert record.pop("time") > 1e9
    assert record == {
        "step": 7,
        "skipped": "non-finite",
        "reward/count": 0.75,
        "accuracy/count": None,
        "grad_norm": None,
        "lr": 0.5,
        "seconds/pack": 0.25,
        "counts": {"reward/count": 4, "accuracy/count": 0},
    }


def test_resumed_file_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = MetricsWriter(tmp_path / "whole", tensorboard=False, resume_step=None)
    for step in range(6):
        whole.write(stats(step))
    crashed = MetricsWriter(tmp_path / "crashed", tensorboard=False, resume_step=None)
    for step in range(5):
        crashed.write(stats(step))
    with (tmp_path / "crashed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tim')  # killed while writing
    resumed = MetricsWriter(tmp_path / "crashed", tensorboard=False, resume_step=3)
    assert [record["step"] for record in read_metrics(tmp_path / "crashed")] == [0, 1, 2]
    for step in range(3, 6):
        resumed.write(stats(step))
    left, right = (read_metrics(tmp_path / name) for name in ("whole", "crashed"))
    assert [_timeless(record) for record in left] == [_timeless(record) for record in right]
    assert [list(record) for record in left] == [list(record) for record in right]


def test_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    MetricsWriter(tmp_path, tensorboard=False, resume_step=None).write(stats(0))
    MetricsWriter(tmp_path, tensorboard=False, resume_step=None)
    assert read_metrics(tmp_path) == []


def test_tensorboard_forgets_the_crashed_tail(tmp_path: Path) -> None:
    crashed = MetricsWriter(tmp_path, tensorboard=True, resume_step=None)
    for step in range(5):
        crashed.write(stats(step, grad_norm=100.0 + step))
    crashed.close()
    resumed = MetricsWriter(tmp_path, tensorboard=True, resume_step=3)
    resumed.write(stats(3, grad_norm=3.0))
    resumed.close()
    assert _scalars(tmp_path, "grad_norm") == [(0, 100.0), (1, 101.0), (2, 102.0), (3, 3.0)]


def test_missing_tensorboard_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name == "tensorboard" or name.startswith("tensorboard.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with caplog.at_level(logging.WARNING):
        writer = MetricsWriter(tmp_path, tensorboard=True, resume_step=None)
        writer.write(stats(0))
        writer.write(stats(1))
    assert len(caplog.records) == 1
    assert "install tensorboard" in caplog.text
    assert len(read_metrics(tmp_path)) == 2


def test_damage_in_the_middle_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl line 2 is not JSON"):
        read_metrics(tmp_path)


def test_strange_text_survives_a_round_trip(tmp_path: Path) -> None:
    text = 'quote " back\\slash \udc80 \u2028 line\nfeed \x00 数字'
    jsonl.append(tmp_path / "a.jsonl", {"step": 0, "text": text, "array": np.array([1.5, np.nan])})
    assert jsonl.read(tmp_path / "a.jsonl") == [{"step": 0, "text": text, "array": [1.5, None]}]


@pytest.mark.parametrize("key", ["../../etc/passwd", "a/b", "a b", ".hidden", "x" * 300, "", "é", "\udc80"])
def test_unsafe_keys_become_safe_and_stay_apart(key: str) -> None:
    name = file_name(key)
    assert "/" not in name
    assert not name.startswith(".")
    assert 0 < len(name) < 120
    assert name.isascii()
    assert name != file_name(key + "/")


def test_safe_keys_keep_their_name() -> None:
    assert file_name("count-7.a_B") == "count-7.a_B"


@pytest.mark.parametrize(
    ("data", "suffix"),
    [
        (PNG, "png"),
        (b"\xff\xd8\xff\xe0", "jpg"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "webp"),
        (b"<svg", "bin"),
        (b"", "bin"),
    ],
)
def test_image_suffix_follows_the_bytes(data: bytes, suffix: str) -> None:
    assert image_suffix(data) == suffix


def test_rollouts_keep_images_rewards_and_advantages(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path, resume_step=None)
    failed = RewardBreakdown(
        components={}, weights={}, total=float("nan"), failure=RewardFailure(kind="timeout", message="5 s")
    )
    first = group("count-1", texts=("3", "4"))
    log.write(2, [ScoredGroup(group=first, rewards=(rewards(1.0), failed))], [np.array([0.5, 0.0])])
    (record,) = read_rollouts(tmp_path)
    assert (record["step"], record["key"], record["task"], record["answer"]) == (2, "count-1", "count", "3")
    assert record["images"] == ["rollouts/count-1-0.png"]
    assert (tmp_path / record["images"][0]).read_bytes() == PNG
    right, wrong = record["rollouts"]
    assert right["components"] == {"accuracy": 1.0, "format": 1.0}
    assert right["failure"] is None
    assert (right["text"], right["tokens"], right["advantage"], right["weight_version"]) == ("3", 2, 0.5, 2)
    assert wrong["total"] is None
    assert wrong["failure"] == {"kind": "timeout", "message": "5 s"}


def test_rollouts_of_unequal_numbers_are_refused(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path, resume_step=None)
    scored = ScoredGroup(group=group("a", texts=("1", "2")), rewards=(rewards(1.0), rewards(0.0)))
    with pytest.raises(ValueError, match="argument"):
        log.write(0, [scored], [np.zeros(1)])


def test_records_are_cut_on_resume(tmp_path: Path) -> None:
    log, evaluation = RolloutLog(tmp_path, resume_step=None), EvaluationLog(tmp_path, resume_step=None)
    for step in range(4):
        log.write(step, [ScoredGroup(group=group(f"k{step}", texts=("1",)), rewards=(rewards(1.0),))], [np.zeros(1)])
        evaluation.write(step, "during", {"count": {"accuracy": 0.5, "count": 4, "half_width": 0.49}}, 0.0)
    RolloutLog(tmp_path, resume_step=2)
    EvaluationLog(tmp_path, resume_step=1)
    assert [record["step"] for record in read_rollouts(tmp_path)] == [0, 1]
    assert [record["step"] for record in read_evaluations(tmp_path)] == [0]
