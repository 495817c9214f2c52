"""What runs beside a writer: hashes of files that grow, and an early flush whose failure is not lost."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from megatron_vlrl.checkpoint.beside import GrowingFiles, flushed_early
from megatron_vlrl.checkpoint.manifest import FileRecord


def test_files_are_hashed_as_they_grow(tmp_path: Path) -> None:
    first, second, never = (tmp_path / name for name in ("first", "second", "never"))
    pieces = [os.urandom(size) for size in (1, 70_000, 3, 2_500_000, 0, 11)]
    files = GrowingFiles([first, second, never])
    with files.followed(), first.open("wb", buffering=0) as a:
        for number, piece in enumerate(pieces):
            a.write(piece)
            if number == 2:
                second.write_bytes(b"late")
            seen = time.monotonic()
            while files.records()[first].size < a.tell() and time.monotonic() < seen + 20:
                time.sleep(0.001)
            assert files.records()[first].size == a.tell()  # while the body runs
        a.write(b"the end")
    content = b"".join(pieces) + b"the end"
    assert files.records() == {
        first: FileRecord(len(content), hashlib.sha256(content).hexdigest()),
        second: FileRecord(4, hashlib.sha256(b"late").hexdigest()),
        never: FileRecord(0, hashlib.sha256().hexdigest()),
    }


def test_what_is_written_is_flushed_meanwhile_and_a_failing_disk_is_told(tmp_path: Path, monkeypatch) -> None:
    flushed: list[str] = []

    def failing(handle: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        raise OSError(5, "the disk is gone")

    def write() -> None:
        with flushed_early(tmp_path):
            (tmp_path / "deep").mkdir()
            (tmp_path / "deep" / "file").write_bytes(b"1")
            started = time.monotonic()
            while not flushed and time.monotonic() < started + 20:
                time.sleep(0.001)

    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        write()
    assert flushed == ["file"]


def test_the_body_has_its_own_error(tmp_path: Path) -> None:
    def write() -> None:
        with flushed_early(tmp_path), GrowingFiles([tmp_path / "a"]).followed():
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        write()
