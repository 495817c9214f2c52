"""Videos from a JSONL line through a shard to a Sample, and lines that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vlrl.data.prepare import prepare
from megatron_vlrl.data.record import dump_row, parse_row
from megatron_vlrl.data.stream import ShardReader
from megatron_vlrl.errors import DataError, SampleError
from megatron_vlrl.types import Video
from tests.data_folder import line, png

FRAMES = ["clip/0.png", "clip/1.png", "clip/2.png"]


def write(folder: Path, *records: dict[str, Any]) -> Path:
    """Shards of these records; the image folder holds a.png, b.png and three frames."""
    images = folder / "images"
    (images / "clip").mkdir(parents=True)
    for grey, name in enumerate(["a.png", "b.png", *FRAMES]):
        (images / name).write_bytes(png(grey))
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    prepare(folder / "data.jsonl", images, folder / "shards", 10)
    return folder / "shards"


def test_frames_come_back_in_order_with_their_times(tmp_path: Path) -> None:
    videos = [{"frames": FRAMES, "fps": 3}, {"frames": FRAMES[1::-1], "timestamps": [0, 2.5]}]
    shards = write(
        tmp_path,
        line("a", videos=videos, prompt="<video> or <image> or <video>?"),
        line("b"),
        line("c", images=[], videos=videos[:1]),
    )
    first, second, third = (ShardReader(shards).read(number, number) for number in range(3))
    assert first.images == (png(0),)
    assert first.videos == (
        Video(frames=(png(2), png(3), png(4)), timestamps=(0.0, 1 / 3, 2 / 3)),
        Video(frames=(png(3), png(2)), timestamps=(0.0, 2.5)),
    )
    assert second.videos == ()
    assert (third.images, third.videos) == ((), first.videos[:1])


def test_a_row_without_videos_is_stored_as_it_was_before_there_were_any() -> None:
    row = parse_row(json.dumps(line("a")).encode())
    assert row.names == row.images
    assert dump_row(row) == (
        b'{"key":"a","task":"count","prompt":[{"role":"user","content":"How many?"}],"images":["a.png"],'
        b'"answer":"1","meta":{}}'
    )


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        ("clip.mp4", "videos must be a list"),
        (["clip.mp4"], "take frames out of a video file before"),
        ([{"frames": FRAMES}], "a video is"),
        ([{"frames": FRAMES, "fps": 2, "timestamps": [0, 1, 2]}], "a video is"),
        ([{"frames": "clip", "fps": 2}], "frames must be a list of paths"),
        ([{"frames": [], "fps": 2}], "at least one frame"),
        *(([{"frames": FRAMES, "fps": fps}], "fps must be a number over 0") for fps in (0, -1, True, "2", None)),
        ([{"frames": FRAMES, "timestamps": [0, 1]}], "3 frames but 2 timestamps"),
        ([{"frames": FRAMES, "timestamps": [0, 2, 1]}], "in order"),
        ([{"frames": FRAMES, "timestamps": [-1, 0, 1]}], "from 0 on"),
        ([{"frames": FRAMES, "timestamps": [0, 1, 10**400]}], "list of seconds"),
        ([{"frames": ["clip/9.png"], "fps": 1}], "cannot read image"),
        ([{"frames": ["../data.jsonl"], "fps": 1}], "leads out of the folder"),
    ],
)
def test_lines_that_cannot_be_taken_name_the_fault(tmp_path: Path, videos: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        write(tmp_path, line("a", videos=videos))
    assert "data.jsonl:1:" in str(caught.value)


def test_infinite_times_are_refused(tmp_path: Path) -> None:
    text = json.dumps(line("a", videos=[{"frames": FRAMES, "timestamps": [0, 1, 2]}])).replace(
        "[0, 1, 2]", "[0,1,1e999]"
    )
    with pytest.raises(DataError, match="list of seconds"):
        parse_row(text.encode())


def test_marks_and_videos_must_agree(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 videos but 2 <video> marks"):
        write(tmp_path, line("a", videos=[{"frames": FRAMES, "fps": 1}], prompt="<video><video>"))


def test_a_shard_that_lacks_a_frame_costs_one_sample(tmp_path: Path) -> None:
    shards = write(tmp_path, line("a", videos=[{"frames": FRAMES, "fps": 1}]), line("b"))
    tar = shards / "train-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"v0.f2.png\0", b"v0.f3.png\0", 1))
    reader = ShardReader(shards)
    with pytest.raises(SampleError, match="sample 'a'"):
        reader.read(0, 0)
    assert reader.read(1, 1).key == "b"
