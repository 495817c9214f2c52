"""What a folder of shards holds: `manifest.json` (files, sizes, hashes, tasks) and `index.npz` (each sample's place).

In: the store of a folder that `data.prepare` wrote. Out: a `Manifest` and an `Index`, checked against what lies there.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vlrl.data.objects import ObjectInfo, ObjectStore
from megatron_vlrl.errors import DataError

VERSION = 1
PIECE = 1 << 23  # bytes that are hashed at a time
MANIFEST = "manifest.json"
INDEX = "index.npz"
COMMAND = "megatron-vlrl data prepare --jsonl FILE --images DIR --out DIR --samples-per-shard N"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file of the folder: plain name, size in bytes, samples it holds, SHA-256 in hex."""

    name: str
    size: int
    samples: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The folder as a whole. tasks: samples by task, in the order of the index's task numbers."""

    version: int
    tasks: Mapping[str, int]
    shards: tuple[FileEntry, ...]
    index: FileEntry

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return self.index.samples

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the tasks and every file's hash: the same only for the same samples at the same places."""
        parts = [*self.tasks, *(file.sha256 for file in (*self.shards, self.index))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write `manifest.json` into the folder."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """Where sample i lies: bytes [offset, offset + size) of a shard, tar headers included. One row for each sample.

    task: int32[S], number in the manifest's tasks. shard: int32[S], number in its shards. offset, size: int64[S].
    key_end: int64[S], where key i ends in `keys`, the UTF-8 bytes of all keys one after another.
    """

    task: NDArray[np.int32]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    key_end: NDArray[np.int64]
    keys: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.offset)

    def key(self, i: int) -> str:
        """Key of sample i."""
        start = self.key_end[i - 1] if i else 0
        return self.keys[start : self.key_end[i]].tobytes().decode()

    def save(self, path: Path) -> None:
        """Write the columns as an uncompressed npz: the same index always gives the same bytes."""
        np.savez(path, allow_pickle=False, **{f.name: getattr(self, f.name) for f in fields(self)})


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(store: ObjectStore) -> tuple[Manifest, dict[str, ObjectInfo]]:
    """Read the manifest and compare every file's size with it. Raises DataError with the fix.

    The second is what each file is now, by name: what it must still be when it is read.
    """
    found = store.list()
    if not found:
        raise DataError(f"there is nothing at {store.url}; make shards with: {COMMAND}")
    if MANIFEST not in found:
        tars = sum(name.endswith(".tar") for name in found)
        held = f"{tars} tar files" if tars else "no shards"
        raise DataError(f"{store.url} holds {held} but no {MANIFEST}, so it was not made by: {COMMAND}")
    manifest = _parse(store)
    if not manifest.samples or not manifest.shards:
        raise DataError(f"{store.url} holds no samples; make it again with: {COMMAND}")
    for entry in (*manifest.shards, manifest.index):
        _check_size(store, entry, found)
    return manifest, {entry.name: found[entry.name] for entry in (*manifest.shards, manifest.index)}


def load_index(store: ObjectStore, manifest: Manifest) -> Index:
    """Read the index. Raises DataError where it is not the one the manifest names, or points outside its shards."""
    path = f"{store.url}/{manifest.index.name}"
    data = store.read_all(manifest.index.name)
    if hashlib.sha256(data).hexdigest() != manifest.index.sha256:
        raise DataError(f"{path} is not the file that {MANIFEST} describes (SHA-256 differs); prepare the shards again")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as columns:
            index = Index(**{f.name: columns[f.name] for f in fields(Index)})
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as an index: {error}; prepare the shards again") from error
    ends = np.array([shard.size for shard in manifest.shards])
    sound = (
        all(len(getattr(index, name)) == manifest.samples for name in ("task", "shard", "offset", "size", "key_end"))
        and bool(np.all((index.task >= 0) & (index.task < len(manifest.tasks))))
        and bool(np.all((index.shard >= 0) & (index.shard < len(ends)) & (index.offset >= 0) & (index.size > 0)))
        and bool(np.all(index.offset + index.size <= ends[index.shard]))
        and bool(np.all(np.diff(index.key_end, prepend=0) > 0) and index.key_end[-1] == len(index.keys))
    )
    if not sound:
        raise DataError(f"{path} does not agree with {MANIFEST}; prepare the shards again")
    return index


def verify(store: ObjectStore) -> Manifest:
    """Hash every file again. Raises DataError naming all that differ from the manifest."""
    manifest, found = load(store)
    bad = [
        entry.name
        for entry in (*manifest.shards, manifest.index)
        if _sha256(store, entry.name, found[entry.name]) != entry.sha256
    ]
    if bad:
        raise DataError(f"{store.url}: SHA-256 differs for {', '.join(bad)}; copy them again, or run: {COMMAND}")
    load_index(store, manifest)
    return manifest


def _sha256(store: ObjectStore, name: str, info: ObjectInfo) -> str:
    digest = hashlib.sha256()
    for start in range(0, info.size, PIECE):
        digest.update(store.read(name, start, min(PIECE, info.size - start), info))
    return digest.hexdigest()


def _check_size(store: ObjectStore, entry: FileEntry, found: Mapping[str, ObjectInfo]) -> None:
    path = f"{store.url}/{entry.name}"
    if entry.name not in found:
        raise DataError(f"{path} is missing, though {MANIFEST} names it; copy the whole folder again")
    if found[entry.name].size != entry.size:
        raise DataError(
            f"{path} has {found[entry.name]} where {MANIFEST} says {entry.size} bytes; cut short? copy it again"
        )


def _parse(store: ObjectStore) -> Manifest:
    path = f"{store.url}/{MANIFEST}"
    try:
        raw = json.loads(store.read_all(MANIFEST))
        version = raw["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a manifest of this program ({error!r}); make one with: {COMMAND}") from error
    if version != VERSION:
        raise DataError(f"{path} has version {version!r}, this program reads {VERSION}; make it again with: {COMMAND}")
    try:
        shards = tuple(_entry(item) for item in raw["shards"])
        tasks = {str(name): int(count) for name, count in raw["tasks"].items()}
        return Manifest(version=version, tasks=tasks, shards=shards, index=_entry(raw["index"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); make it again with: {COMMAND}") from error


def _entry(item: Mapping[str, Any]) -> FileEntry:
    name = str(item["name"])
    if Path(name).name != name:  # a manifest from elsewhere must not lead out of its folder
        raise ValueError(f"{name!r} is not a plain file name")
    return FileEntry(name=name, size=int(item["size"]), samples=int(item["samples"]), sha256=str(item["sha256"]))
