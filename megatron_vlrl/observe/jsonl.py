"""JSON lines: one record a line, appended as a run goes, cut back to the step from which it resumes.

In: dictionaries with a "step". Out: strict JSON (NaN and infinities as null), readable by anything.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlrl.errors import DataError


def plain(value: Any) -> Any:
    """Turn numpy values into Python's and non-finite numbers into None, at any depth."""
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(plain(record), ensure_ascii=False, allow_nan=False)
    # A lone surrogate, which byte-level decoding can leave in a response, becomes its JSON escape \udXXX.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line; it has reached the operating system on return."""
    with path.open("ab") as file:
        file.write(_line(record))


def read(path: Path) -> list[dict[str, Any]]:
    """Every record, in order; a file that does not exist has none.

    A last line without its end is what a crash leaves, and is passed over; any other damage raises DataError.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path} line {number} is not JSON ({error}); remove that line") from error
    return records


def restart(path: Path, resume_step: int | None) -> None:
    """Cut away the records of `resume_step`, the step that comes next, or later; all of them for None (a new run)."""
    if resume_step is None:
        path.unlink(missing_ok=True)
        return
    kept = [record for record in read(path) if record["step"] < resume_step]
    if path.exists():
        replace(path, b"".join(_line(record) for record in kept))


def replace(path: Path, content: bytes) -> None:
    """Write a whole file so that a reader sees the old one or the new one, never half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
