"""One question as JSON <-> its checked fields: the form of a JSONL line and of a shard's `KEY.json` member alike.

In: JSON text. Out: `Row`, and with its images' bytes a `Sample`. Knows nothing of files, tar or order.
In a JSONL line `images` holds paths; in a shard it holds the member suffixes (`0.png`, `1.jpg`), in the prompt's order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn, get_args, get_type_hints

from megatron_vlrl.errors import DataError
from megatron_vlrl.types import Message, Sample

REQUIRED = ("key", "task", "prompt", "images", "answer")
FIELDS = (*REQUIRED, "meta")
ROLES: tuple[str, ...] = get_args(get_type_hints(Message)["role"])
MAX_KEY_BYTES = 80  # a plain tar header holds 100 bytes of name; the rest is for `.12345.jpeg`


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The fields of one question; `images` are names, not bytes."""

    key: str
    task: str
    messages: tuple[Message, ...]
    images: tuple[str, ...]
    answer: Any
    meta: Mapping[str, Any]


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
        images=_names(record["images"]),
        answer=record["answer"],
        meta=meta,
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
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode()


def make_sample(row: Row, images: tuple[bytes, ...], position: int) -> Sample:
    """Join a row with its images' bytes. Raises DataError where `<image>` marks and images disagree."""
    try:
        return Sample(
            key=row.key,
            task=row.task,
            messages=row.messages,
            images=images,
            answer=row.answer,
            position=position,
            meta=row.meta,
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


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise DataError(f"images must be a list of paths, found {value!r}")
    return tuple(value)


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
