"""Bytes of a tar shard <-> one sample: writes members with webdataset, reads them back from their place alone.

A sample is a run of neighbouring members: `KEY.0.png`, `KEY.1.jpg`, ..., `KEY.v0.f0.png` (frame 0 of video 0), ... and
`KEY.json`, whose `images` and `videos` name these.
Reading trusts nothing: a header that is damaged, a name that is not the index's, a link, a path or a member type
outside MEMBER_TYPES is a SampleError. Nothing is ever unpickled or unpacked to disk.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from megatron_vlrl.data.manifest import FileEntry
from megatron_vlrl.data.record import Row, dump_row, make_sample, parse_row
from megatron_vlrl.errors import DataError
from megatron_vlrl.types import Sample

IMAGE_TYPES = ("png", "jpg", "jpeg", "webp")
MEMBER_TYPES = ("json", *IMAGE_TYPES)
BLOCK = tarfile.BLOCKSIZE


class _HashedFile:
    """A file to write, hashed and counted as it goes."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 (closed by ShardWriter)
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    def close(self) -> str:
        self._file.close()
        return self._digest.hexdigest()


class ShardWriter:
    """Writes one shard; the same samples always give the same bytes (no clock, no user name)."""

    def __init__(self, path: Path) -> None:
        import webdataset  # 1.5 s: only those who write pay for it

        self._name = path.name
        self._file = _HashedFile(path)
        self._tar = webdataset.TarWriter(
            self._file, encoder=False, compress=False, mtime=0, user="vlrl", group="vlrl", format=tarfile.USTAR_FORMAT
        )
        self.samples = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._tar.close()
        finally:
            self._file.close()

    def add(self, row: Row, files: Sequence[tuple[str, bytes]]) -> tuple[int, int]:
        """Append a sample. Returns offset and size in bytes, headers included.

        files: (suffix, encoded bytes) of its images and frames, in the order of `row.names`.
        """
        renamed = _member_names(row, [suffix for suffix, _ in files])
        members = {name: data for name, (_, data) in zip(renamed.names, files, strict=True)}
        start = self._tar.tarstream.offset
        self._tar.write({"__key__": row.key, "json": dump_row(renamed), **members})
        self.samples += 1
        return start, self._tar.tarstream.offset - start

    def finish(self) -> FileEntry:
        """End the archive and describe it."""
        self._tar.close()
        return FileEntry(name=self._name, sha256=self._file.close(), size=self._file.size, samples=self.samples)


def _member_names(row: Row, suffixes: Sequence[str]) -> Row:
    """The row with the names that its files have in a shard."""
    suffix = iter(suffixes)
    images = tuple(f"{i}.{next(suffix)}" for i in range(len(row.images)))
    videos = tuple(
        replace(video, frames=tuple(f"v{number}.f{i}.{next(suffix)}" for i in range(len(video.frames))))
        for number, video in enumerate(row.videos)
    )
    return replace(row, images=images, videos=videos)


def parse_sample(block: bytes, key: str, position: int) -> Sample:
    """The sample whose members, headers included, are `block`. Raises DataError where it is not sample `key`, whole."""
    members = dict(_members(block, key))
    if "json" not in members:
        raise DataError(f"no member {key}.json")
    row = parse_row(members.pop("json"))
    if row.key != key:
        raise DataError(f"its JSON is of sample {row.key!r}")
    if sorted(row.names) != sorted(members):
        raise DataError(f"its JSON names images {list(row.names)}, the shard holds {list(members)}")
    return make_sample(row, [members[name] for name in row.names], position)


def _members(block: bytes, key: str) -> Iterator[tuple[str, bytes]]:
    """(name without the key, content) of each tar member in the block."""
    offset = 0
    while offset < len(block):
        try:
            info = tarfile.TarInfo.frombuf(block[offset : offset + BLOCK], "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            raise DataError(f"damaged tar header ({error})") from error
        prefix, _, suffix = info.name.partition(".")
        if prefix != key or suffix.rpartition(".")[2] not in MEMBER_TYPES or not info.isreg():
            raise DataError(f"member {info.name!r} is no {'/'.join(MEMBER_TYPES)} file of this sample")
        content = block[offset + BLOCK : offset + BLOCK + info.size]
        if len(content) != info.size:
            raise DataError(f"member {info.name!r} is cut short at {len(content)} of {info.size} bytes")
        yield suffix, content
        offset += BLOCK + -(-info.size // BLOCK) * BLOCK
