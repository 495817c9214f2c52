"""One question as JSON <-> its checked fields: the form of a JSONL line and of a shard's `KEY.json` member alike.

In: JSON text. Out: `Row`, and with its images' bytes a `Sample`. Knows nothing of files, tar or order.
In a JSONL line `images` holds paths; in a shard it holds the member suffixes (`0.png`, `1.jpg`), in the prompt's order.
A video is `{"frames": [names], "fps": 2}` or `{"frames": [names], "timestamps": [0.0, 0.5]}`, in a shard the latter
with suffixes `v0.f0.png`, ...: its frames have been taken out of their container before, by another program.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn, get_args, get_type_hints

from megatron_vlrl.errors import DataError
from megatron_vlrl.types import Message, Sample, Video

REQUIRED = ("key", "task", "prompt", "images", "answer")
FIELDS = (*REQUIRED, "meta", "videos")
ROLES: tuple[str, ...] = get_args(get_type_hints(Message)["role"])
MAX_KEY_BYTES = 80  # a plain tar header holds 100 bytes of name; the rest is for `.v999.f12345.jpeg`
MAX_SECONDS = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoRow:
    """The names of a video's frames and their times in seconds, one for each."""

    frames: tuple[str, ...]
    timestamps: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The fields of one question; `images` and frames of `videos` are names, not bytes."""

    key: str
    task: str
    messages: tuple[Message, ...]
    images: tuple[str, ...]
    answer: Any
    meta: Mapping[str, Any]
    videos: tuple[VideoRow, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Those of every image, then of every frame."""
        return (*self.images, *(name for video in self.videos for name in video.frames))


def parse_row(text: bytes) -> Row:
    """Check every field of one JSON object. Raises DataError that names the field and the value."""
    try:
        record = json.loads(text, parse_constant=_no_constant)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DataError(f"not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"expected a JSON object, found {type(record).__name__}")
    _check_names(record)
    meta = record.get("meta", {})
    if not isinstance(meta, dict):
        raise DataError(f"meta must be an object, found {meta!r}")
    return Row(
        key=_key(record["key"]),
        task=_text(record["task"], "task"),
        messages=_messages(record["prompt"]),
        images=_names(record["images"], "images"),
        answer=record["answer"],
        meta=meta,
        videos=_videos(record.get("videos", [])),
    )


def dump_row(row: Row) -> bytes:
    """The shard's `KEY.json` member: the same row always gives the same bytes."""
    prompt = [{"role": m.role, "content": m.content} for m in row.messages]
    record = {
        "key": row.key,
        "task": row.task,
        "prompt": prompt,
        "images": list(row.images),
        "answer": row.answer,
        "meta": row.meta,
    }
    if row.videos:
        record["videos"] = [{"frames": list(v.frames), "timestamps": list(v.timestamps)} for v in row.videos]
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode()


def make_sample(row: Row, files: Sequence[bytes], position: int) -> Sample:
    """Join a row with its files' bytes, in the order of `row.names`.

    Raises DataError where `<image>` marks and images, `<video>` marks and videos, or frames and timestamps disagree.
    """
    content = iter(files)
    try:
        return Sample(
            key=row.key,
            task=row.task,
            messages=row.messages,
            images=tuple(next(content) for _ in row.images),
            answer=row.answer,
            position=position,
            meta=row.meta,
            videos=tuple(
                Video(frames=tuple(next(content) for _ in video.frames), timestamps=video.timestamps)
                for video in row.videos
            ),
        )
    except ValueError as error:
        raise DataError(str(error)) from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _check_names(record: Mapping[str, Any]) -> None:
    missing = [name for name in REQUIRED if name not in record]
    if missing:
        raise DataError(f"missing field {missing[0]!r}; a line has {', '.join(REQUIRED)} and, if wanted, meta")
    for name in record:
        if name not in FIELDS:
            near = get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "put further values under 'meta'"
            raise DataError(f"unknown field {name!r}; {hint}")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise DataError(f"{name} must be a string that is not empty, found {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} is no Unicode text: {error}") from error
    return value


def _key(value: Any) -> str:
    key = _text(value, "key")
    if any(char in "/\\." or not char.isprintable() for char in key):
        raise DataError(f"key {key!r} holds '/', '\\', '.' or a control character; it names the files of its sample")
    if len(key.encode()) > MAX_KEY_BYTES:
        raise DataError(f"key {key!r} is longer than {MAX_KEY_BYTES} bytes; shorten it")
    return key


def _names(value: Any, field: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise DataError(f"{field} must be a list of paths, found {value!r}")
    return tuple(value)


def _videos(value: Any) -> tuple[VideoRow, ...]:
    if not isinstance(value, list):
        raise DataError(f"videos must be a list, found {value!r}")
    return tuple(_video(video) for video in value)


def _video(value: Any) -> VideoRow:
    if not isinstance(value, dict) or set(value) not in ({"frames", "fps"}, {"frames", "timestamps"}):
        raise DataError(
            f'a video is {{"frames": [paths], "fps": number}} or {{"frames": [paths], "timestamps": [seconds]}}, found '
            f"{value!r}; take frames out of a video file before"
        )
    frames = _names(value["frames"], "frames")
    if "timestamps" in value:
        times = value["timestamps"]
        if not isinstance(times, list) or not all(_is_number(time) for time in times):
            raise DataError(f"timestamps must be a list of seconds, found {times!r}")
        return VideoRow(frames=frames, timestamps=tuple(map(float, times)))
    fps = value["fps"]
    if not _is_number(fps) or fps <= 0:
        raise DataError(f"fps must be a number over 0, found {fps!r}")
    return VideoRow(frames=frames, timestamps=tuple(number / fps for number in range(len(frames))))


def _is_number(value: Any) -> bool:
    """JSON's `true` is none, nor is what no clock counts: 1e999, which is read as infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_SECONDS


def _messages(prompt: Any) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return (Message(role="user", content=_text(prompt, "prompt")),)
    if not isinstance(prompt, list) or not prompt:
        raise DataError(f"prompt must be a string or a list of messages, found {prompt!r}")
    return tuple(_message(turn) for turn in prompt)


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
        raise DataError(f'a message is {{"role": ..., "content": ...}}, found {turn!r}')
    if turn["role"] not in ROLES:
        raise DataError(f"message role {turn['role']!r} is none of {', '.join(ROLES)}")
    return Message(role=turn["role"], content=_text(turn["content"], "content"))
