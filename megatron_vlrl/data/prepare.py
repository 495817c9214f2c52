"""A user's JSONL and image folder -> webdataset shards with a manifest and an index.

In: lines `{"key", "task", "prompt", "images": [paths], "answer", "meta": {}, "videos": [{"frames": [paths], "fps"}]}`,
the last two if wanted. Out: a folder with `train-000000.tar`, ..., `index.npz` and `manifest.json`, which appears whole
or not at all. The same input gives the same bytes.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlrl.data.decode import image_suffix
from megatron_vlrl.data.manifest import INDEX, VERSION, FileEntry, Index, Manifest, sha256_file
from megatron_vlrl.data.record import Row, make_sample, parse_row
from megatron_vlrl.data.shard import ShardWriter
from megatron_vlrl.errors import DataError, VLRLError

Check = Callable[[str, Any], None]
Item = tuple[Row, list[tuple[str, bytes]]]


def prepare(jsonl: Path, images: Path, out: Path, samples_per_shard: int, check: Check | None = None) -> Manifest:
    """Write the shards of `jsonl` to `out`, which must not exist or be empty.

    Paths of images and frames are taken from the folder `images` and may not lead out of it; their bytes are stored
    untouched. They are recognised by their first bytes only: one that is damaged further on is found, skipped and
    counted when it is decoded. check(task, answer) raises a VLRLError for a gold answer that its task could never
    reward. Raises DataError with file and line number for the first line that cannot be taken.
    """
    if samples_per_shard < 1:
        raise DataError(f"samples per shard must be 1 or more, not {samples_per_shard}")
    for path, found in ((jsonl, jsonl.is_file()), (images, images.is_dir())):
        if not found:
            raise DataError(f"no such {'file' if path == jsonl else 'folder'}: {path}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} exists and is not empty; remove it or name another folder")
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        manifest = _write(part, _items(jsonl, images, check), samples_per_shard)
        if not manifest.samples:
            raise DataError(f"{jsonl} holds no samples")
        part.rename(out)
    except OSError as error:
        raise DataError(f"cannot write shards to {out}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return manifest


def _items(jsonl: Path, images: Path, check: Check | None) -> Iterator[Item]:
    """Each line's row and its images and frames as (suffix, bytes)."""
    root = images.resolve()
    first_line: dict[str, int] = {}
    with open(jsonl, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = parse_row(line)
                if row.key in first_line:
                    raise DataError(f"key {row.key!r} was used before, in line {first_line[row.key]}")
                first_line[row.key] = number
                if check is not None:
                    check(row.task, row.answer)
                loaded = [_image(root, name) for name in row.names]
                make_sample(row, [data for _, data in loaded], position=0)
            except VLRLError as error:
                raise DataError(f"{jsonl}:{number}: {error}") from error
            yield row, loaded


def _image(root: Path, name: str) -> tuple[str, bytes]:
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise DataError(f"image {name!r} leads out of the folder {root}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read image {path}: {error.strerror}") from error
    suffix = image_suffix(data)
    if suffix is None:
        raise DataError(f"image {path} is no PNG, JPEG or WebP (it starts with {data[:8]!r})")
    return suffix, data


def _write(folder: Path, items: Iterator[Item], samples_per_shard: int) -> Manifest:
    shards: list[FileEntry] = []
    keys: list[str] = []
    tasks: list[str] = []
    places: list[tuple[int, int, int]] = []  # shard, offset, size
    item = next(items, None)
    while item is not None:
        with ShardWriter(folder / f"train-{len(shards):06d}.tar") as shard:
            while item is not None and shard.samples < samples_per_shard:
                row, files = item
                keys.append(row.key)
                tasks.append(row.task)
                places.append((len(shards), *shard.add(row, files)))
                item = next(items, None)
            shards.append(shard.finish())
    counts = dict(Counter(tasks))
    _index(keys, tasks, places, list(counts)).save(folder / INDEX)
    size = (folder / INDEX).stat().st_size
    entry = FileEntry(name=INDEX, size=size, samples=len(keys), sha256=sha256_file(folder / INDEX))
    manifest = Manifest(version=VERSION, tasks=counts, shards=tuple(shards), index=entry)
    manifest.save(folder)
    return manifest


def _index(keys: list[str], tasks: list[str], places: list[tuple[int, int, int]], names: list[str]) -> Index:
    number = {name: i for i, name in enumerate(names)}
    table = np.array(places, dtype=np.int64).reshape(-1, 3)
    encoded = [key.encode() for key in keys]
    return Index(
        task=np.array([number[task] for task in tasks], dtype=np.int32),
        shard=table[:, 0].astype(np.int32),
        offset=table[:, 1].copy(),
        size=table[:, 2].copy(),
        key_end=np.cumsum([len(key) for key in encoded], dtype=np.int64),
        keys=np.frombuffer(b"".join(encoded), dtype=np.uint8),
    )
