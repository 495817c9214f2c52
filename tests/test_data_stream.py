"""Shards -> samples -> prompts: ranks share one order, runs resume, and damage costs the damaged sample only."""

from __future__ import annotations

import json
import logging
import tarfile

import numpy as np
import pytest

from megatron_vlrl.data.decode import decode_image
from megatron_vlrl.data.loader import PromptLoader, check_bad_samples, held_out
from megatron_vlrl.data.objects.folder import Folder
from megatron_vlrl.data.stream import SampleStream, ShardReader
from megatron_vlrl.errors import DataError, SampleError
from megatron_vlrl.types import Prompt, Sample
from tests.data_folder import line, make_shards, png, write_source

COUNTS = {"count": 9, "read": 5, "box": 6}


def _stream(folder, *, seed=0, weights=None, rank=0, world=1) -> SampleStream:
    return SampleStream(folder, seed=seed, weights=weights or {}, rank=rank, world=world)


def _render(sample: Sample) -> Prompt:
    for image in sample.images:
        decode_image(image, sample.key)
    return Prompt(sample=sample, token_ids=(1,), positions=np.zeros((3, 1), np.int64), grids=(), patches=())


def _damage(folder, key: str, at: int, value: bytes) -> None:
    """Overwrite bytes of a sample's place in its shard, keeping every size."""
    reader = ShardReader(folder)
    number = next(i for i in range(len(reader)) if reader.index.key(i) == key)
    shard = folder / reader.manifest.shards[reader.index.shard[number]].name
    data = bytearray(shard.read_bytes())
    start = int(reader.index.offset[number]) + at
    data[start : start + len(value)] = value
    shard.write_bytes(data)


def test_samples_come_back_as_they_were_prepared(tmp_path):
    turns = [{"role": "system", "content": "Short."}, {"role": "user", "content": "<image> or <image>?"}]
    record = line("two", prompt=turns, images=["two.png", "other.png"], answer={"x": [1, None]}, meta={"scans": [3]})
    jsonl, images = write_source(tmp_path, [line("one"), record])
    (images / "other.png").write_bytes(png(77))
    from megatron_vlrl.data.prepare import prepare

    prepare(jsonl, images, tmp_path / "out", 5)
    sample = ShardReader(tmp_path / "out").read(1, position=40)
    assert (sample.key, sample.task, sample.position) == ("two", "count", 40)
    assert [(m.role, m.content) for m in sample.messages] == [(t["role"], t["content"]) for t in turns]
    assert sample.images == (png(1), png(77))
    assert (sample.answer, sample.meta) == ({"x": [1, None]}, {"scans": [3]})


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_together_read_what_one_rank_reads(tmp_path, world):
    folder = make_shards(tmp_path, COUNTS)
    alone = _stream(folder, weights={"count": 2, "read": 1, "box": 1})
    ranks = [_stream(folder, weights={"count": 2, "read": 1, "box": 1}, rank=r, world=world) for r in range(world)]
    for count in (8, 7, 1, 30):
        expected = {s.position: s.key for s in alone.next(count)}
        parts = [rank.next(count) for rank in ranks]
        assert all(s.position % world == r for r, part in enumerate(parts) for s in part)
        assert {s.position: s.key for part in parts for s in part} == expected
    assert all(rank.state() == alone.state() for rank in ranks)


def test_positions_count_up_and_tasks_rotate(tmp_path):
    samples = _stream(make_shards(tmp_path, COUNTS)).next(60)
    assert [s.position for s in samples] == list(range(60))
    assert all({s.task for s in samples[i : i + 3]} == set(COUNTS) for i in range(58))


def test_a_restored_stream_goes_on_with_another_number_of_ranks(tmp_path):
    folder = make_shards(tmp_path, COUNTS)
    whole = _stream(folder)
    whole.next(13)
    state = json.loads(json.dumps(whole.state()))
    expected = {s.position: s.key for s in whole.next(20)}
    parts = [_stream(folder, rank=r, world=4) for r in range(4)]
    for part in parts:
        part.restore(state)
    assert {s.position: s.key for part in parts for s in part.next(20)} == expected


def test_restore_says_what_changed(tmp_path):
    folder = make_shards(tmp_path / "a", COUNTS)
    other = make_shards(tmp_path / "b", {**COUNTS, "box": 7})
    state = _stream(folder).state()
    for stream, words in [
        (_stream(folder, seed=1), r"run\.seed changed from 0 to 1"),
        (_stream(folder, weights={"count": 1}), r"data\.weights changed from \{.*'box': 1\} to \{'count': 1\}"),
        (_stream(other), "the shards changed"),
    ]:
        with pytest.raises(DataError, match=words):
            stream.restore(state)
    _stream(folder, weights=dict.fromkeys(COUNTS, 0.5)).restore(state)  # the same proportions are the same order
    with pytest.raises(DataError, match="no 'cursor'"):
        _stream(folder).restore({})


def test_rank_outside_the_world_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"rank 2 is not in 0\.\.1"):
        _stream(make_shards(tmp_path, {"count": 1}), rank=2, world=2)


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, b"count-7.0.png", "'count-7.0.png' is no"),  # checksum repaired below
        (0, b"../../x.0.png", "is no json/png/jpg/jpeg/webp file"),
        (0, b"count-3.0.pkl", "'count-3.0.pkl' is no"),
        (156, b"2", "is no"),  # a symbolic link
        (124, b"77777777777\0", "cut short"),
        (10, b"\xff\xff", "damaged tar header"),
    ],
)
def test_members_that_are_not_the_samples_own_are_refused(tmp_path, at, value, words):
    folder = make_shards(tmp_path, {"count": 9})
    _damage(folder, "count-3", at, value)
    if "damaged" not in words:
        _repair_checksum(folder, "count-3")
    reader = ShardReader(folder)
    with pytest.raises(SampleError, match=words) as error:
        reader.read(3, position=0)
    assert error.value.key == "count-3"
    assert [reader.read(i, 0).key for i in (2, 4)] == ["count-2", "count-4"]


def _repair_checksum(folder, key: str) -> None:
    reader = ShardReader(folder)
    number = next(i for i in range(len(reader)) if reader.index.key(i) == key)
    shard = folder / reader.manifest.shards[reader.index.shard[number]].name
    start = int(reader.index.offset[number])
    header = shard.read_bytes()[start : start + 512]
    unsigned, _ = tarfile.calc_chksums(header)
    _damage(folder, key, 148, b"%06o\0 " % unsigned)


def test_json_that_belongs_to_another_sample_is_refused(tmp_path):
    folder = make_shards(tmp_path, {"count": 3})
    # Layout: image header, image (one block), JSON header, JSON.
    for at, value, words in [(1536 + 8, b"count-1", "of sample 'count-1'"), (1536, b"[", "not valid JSON")]:
        _damage(folder, "count-2", at, value)
        with pytest.raises(SampleError, match=words):
            ShardReader(folder).read(2, 0)


def test_a_shard_that_vanishes_stops_the_run(tmp_path):
    folder = make_shards(tmp_path, {"count": 3})
    stream = _stream(folder)
    (folder / "train-000000.tar").unlink()
    with pytest.raises(DataError, match=r"cannot read .*train-000000\.tar") as error:
        stream.next(1)
    assert not isinstance(error.value, SampleError)


def _bad_folder(tmp_path):
    """Nine samples: the image of count-2 is damaged, the tar header of count-5 too."""
    folder = make_shards(tmp_path, {"count": 9})
    _damage(folder, "count-2", 512 + 20, b"\0" * 30)
    _damage(folder, "count-5", 0, b"\xff")
    return folder


def test_bad_samples_are_skipped_named_logged_once_and_not_replaced(tmp_path, caplog):
    loader = PromptLoader(_stream(_bad_folder(tmp_path)), _render)
    with caplog.at_level(logging.WARNING):
        first, second = loader.next(9), loader.next(9)
    assert len(first) == len(second) == 7
    assert [p.sample.position // 9 for p in first + second] == [0] * 7 + [1] * 7
    assert set(loader.bad) == {"count-2", "count-5"}
    assert "cannot be decoded" in loader.bad["count-2"]
    assert "damaged tar header" in loader.bad["count-5"]
    messages = [record.getMessage() for record in caplog.records]
    assert sorted(m.split(":")[0] for m in messages) == ["skipped sample count-2", "skipped sample count-5"]


def test_over_budget_stops_with_a_summary(tmp_path):
    loader = PromptLoader(_stream(_bad_folder(tmp_path)), _render)
    loader.next(9)
    check_bad_samples(loader.bad, 2)
    with pytest.raises(DataError, match=r"2 samples .* data\.max_bad_samples=1") as error:
        check_bad_samples(loader.bad, 1)
    assert "count-2: image of" in str(error.value)
    assert "count-5: train-000000.tar at byte" in str(error.value)


def test_the_loader_resumes_with_what_was_bad(tmp_path):
    folder = _bad_folder(tmp_path)
    loader = PromptLoader(_stream(folder), _render)
    loader.next(9)
    state = json.loads(json.dumps(loader.state()))
    again = PromptLoader(_stream(folder), _render)
    again.restore(state)
    assert again.bad == loader.bad
    assert [p.sample.key for p in again.next(9)] == [p.sample.key for p in loader.next(9)]
    assert again.state() == loader.state()


def test_an_error_of_the_program_is_not_taken_for_a_bad_sample(tmp_path):
    def render(sample: Sample) -> Prompt:
        raise KeyError(sample.key)

    with pytest.raises(KeyError):
        PromptLoader(_stream(make_shards(tmp_path, COUNTS)), render).next(1)


def test_held_out_takes_the_first_of_each_task(tmp_path):
    folder = make_shards(tmp_path, COUNTS)
    samples = held_out(folder, 6)
    expected = [f"{task}-{n}" for task, count in COUNTS.items() for n in range(min(count, 6))]
    assert [s.key for s in samples] == expected
    index = ShardReader(folder)
    assert [s.position for s in samples] == [i for i in range(len(index)) if index.index.key(i) in expected]


def test_held_out_refuses_damage(tmp_path):
    with pytest.raises(SampleError, match="count-5"):
        held_out(_bad_folder(tmp_path), 9)


def test_a_stream_opens_without_touching_a_shard(tmp_path, monkeypatch):
    folder = make_shards(tmp_path, COUNTS)
    opened = []
    real = Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, name, *span: opened.append(name) or real(self, name, *span))
    _stream(folder)
    assert sorted(opened) == ["index.npz", "manifest.json"]
