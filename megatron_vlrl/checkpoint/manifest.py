"""MANIFEST.json: what a finished checkpoint consists of, with a SHA-256 for every file and for itself.

Written last, so a folder without it was never finished. A manifest is not trusted: names that leave the folder, an
unknown version or a flipped bit raise CheckpointError.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_vlrl.checkpoint.files import hash_file, write_text
from megatron_vlrl.errors import CheckpointError

MANIFEST_NAME = "MANIFEST.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class FileRecord:
    """size: bytes. sha256: hex."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """One checkpoint. sequence: grows with every save of a folder, also after a run went back to an earlier step.

    layout: how the run was spread when it saved (degrees, processes). files: by name relative to the folder.
    """

    step: int
    sequence: int
    layout: Mapping[str, Any]
    files: Mapping[str, FileRecord]

    def write(self, folder: Path) -> None:
        """Put the manifest into `folder`, flushed to disk."""
        body = {"format": FORMAT, "step": self.step, "sequence": self.sequence, "layout": dict(self.layout)}
        body["files"] = {name: asdict(record) for name, record in sorted(self.files.items())}
        write_text(folder / MANIFEST_NAME, json.dumps({**body, "checksum": _checksum(body)}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of `folder`; CheckpointError if it is missing, damaged or of another format."""
        path = folder / MANIFEST_NAME
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            checksum = body.pop("checksum")
            if checksum != _checksum(body):
                raise CheckpointError(f"{path} does not match its own checksum")
            if body["format"] != FORMAT:
                raise CheckpointError(f"{path} has format {body['format']}; this version reads format {FORMAT}")
            files = {name: FileRecord(**record) for name, record in body["files"].items()}
            manifest = cls(step=body["step"], sequence=body["sequence"], layout=body["layout"], files=files)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); it was never finished") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r})") from error
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise CheckpointError(f"{path} names {name!r}, outside its folder")
        return manifest


def describe_file(folder: Path, name: str) -> FileRecord:
    """Size and hash of a file as it lies on disk."""
    path = folder / name
    return FileRecord(path.stat().st_size, hash_file(path))


def check_file(folder: Path, name: str, expected: FileRecord) -> str | None:
    """What is wrong with a file of a checkpoint, or None."""
    try:
        size = (folder / name).stat().st_size
        if size != expected.size:
            return f"{name} has {size} bytes instead of {expected.size}"
        if hash_file(folder / name) != expected.sha256:
            return f"{name} does not match its SHA-256"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
