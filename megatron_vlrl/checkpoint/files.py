"""File operations that survive a crash: hash, flush to disk, replace in one step. No torch, no collectives."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader, or a crash, sees the old content or the new, never a part."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    flush(path.parent)


def list_files(folder: Path) -> list[str]:
    """Every file under a folder, as sorted relative names with `/`."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def flush_folders(folder: Path) -> None:
    """Force the entries of a folder and of every folder below it to the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            flush(path)
    flush(folder)


def discard(folder: Path, trash: Path) -> None:
    """Delete a folder so that it is never seen half deleted under its own name: moved to `trash` first."""
    folder.rename(trash)
    shutil.rmtree(trash)
