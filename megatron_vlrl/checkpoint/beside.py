"""Beside a thread that writes files, others that hash and flush them: on another core, and while the disk is idle.

Both read only what is already in the files, so the writer knows nothing of them and nothing is kept in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from megatron_vlrl.checkpoint.files import list_files
from megatron_vlrl.checkpoint.manifest import FileRecord

_BUFFER = 1 << 20  # bytes; the interpreter's lock is taken once for each
_HASH_PAUSE, _FLUSH_PAUSE = 0.01, 0.1  # seconds before looking again


class GrowingFiles:
    """The SHA-256 of files that are appended to, and never changed where they are already written."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """paths: need not exist yet."""
        self._hashes = {path: hashlib.sha256() for path in paths}
        self._sizes = dict.fromkeys(paths, 0)
        self._buffer = memoryview(bytearray(_BUFFER))

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Hash while the body writes; at its end everything is hashed. OSError if a file cannot be read."""
        with _repeated(self._advance, _HASH_PAUSE):
            yield
        self._advance()

    def records(self) -> dict[Path, FileRecord]:
        """Bytes hashed so far, and their hash."""
        return {path: FileRecord(self._sizes[path], found.hexdigest()) for path, found in self._hashes.items()}

    def _advance(self) -> None:
        for path, found in self._hashes.items():
            if not path.exists():
                continue
            with path.open("rb", buffering=0) as stream:
                stream.seek(self._sizes[path])
                while count := stream.readinto(self._buffer):
                    found.update(self._buffer[:count])
                    self._sizes[path] += count


@contextmanager
def flushed_early(folder: Path) -> Iterator[None]:
    """Bring to the disk what the body writes under `folder`, so that a flush at the end finds little to do.

    OSError at the end of the body if the disk failed meanwhile: the later flush would not be told.
    """

    def flush_all() -> None:
        for name in list_files(folder):
            handle = os.open(folder / name, os.O_RDONLY)
            try:
                os.fdatasync(handle)
            finally:
                os.close(handle)

    with _repeated(flush_all, _FLUSH_PAUSE):
        yield


@contextmanager
def _repeated(work: Callable[[], None], pause: float) -> Iterator[None]:
    """Call `work` in a thread again and again while the body runs; raise its error after it."""
    ended = Event()

    def run() -> None:
        while not ended.wait(pause):
            work()

    with ThreadPoolExecutor(max_workers=1) as pool:
        rounds = pool.submit(run)
        try:
            yield
        finally:
            ended.set()
        rounds.result()
