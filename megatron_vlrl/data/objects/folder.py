"""A local folder as an ObjectStore: plain files, no tags, no retries."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from megatron_vlrl.data.objects.store import ObjectInfo
from megatron_vlrl.errors import DataError


class Folder:
    """Files of one folder."""

    def __init__(self, folder: str | Path) -> None:
        self.url = str(folder)

    def size_and_tag(self, name: str) -> ObjectInfo:
        """The file's size. Raises DataError where there is none."""
        path = self._path(name)
        try:
            return ObjectInfo(os.stat(path).st_size)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error}") from error

    def read(self, name: str, start: int, length: int, expected: ObjectInfo | None = None) -> bytes:
        """Bytes [start, start + length) by one seek; the size is seen only where it is too small for them."""
        path = self._path(name)
        try:
            with open(path, "rb") as file:
                file.seek(start)
                block = file.read(length)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error}") from error
        if len(block) != length:
            raise DataError(f"{path} gave {len(block)} of {length} bytes from byte {start}; cut short? copy it again")
        return block

    def read_all(self, name: str) -> bytes:
        """The whole file."""
        return self.read(name, 0, self.size_and_tag(name).size)

    def list(self) -> Mapping[str, ObjectInfo]:
        """Its files and links to files; empty where there is no such folder. Raises DataError for what is none."""
        try:
            with os.scandir(self.url) as entries:
                return {entry.name: ObjectInfo(entry.stat().st_size) for entry in entries if entry.is_file()}
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise DataError(f"cannot read folder {self.url}: {error}") from error

    def _path(self, name: str) -> str:
        return os.path.join(self.url, name)
