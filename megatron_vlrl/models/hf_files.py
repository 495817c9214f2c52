"""The safetensors of a Hugging Face folder, read lazily: names, shapes, dtypes from the headers, tensors one at a time.

In: a folder with `model.safetensors`, or with an index and its shards. Out: `HFWeights`. A folder that was only half
downloaded is found on construction, before any tensor is read. Knows nothing of a model or a backend.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vlrl.errors import ModelError

if TYPE_CHECKING:
    import torch

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit; a larger one is a damaged or hostile file

# safetensors' dtype -> (torch's name, bytes of one number)
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: str


class HFWeights:
    """The weights of one folder, by Hugging Face name; every file's length is checked against its header at once."""

    def __init__(self, folder: Path) -> None:
        """Read the headers under `folder`; ModelError if a file is missing, truncated or not safetensors."""
        self.folder = Path(folder)
        self._entries = _entries(self.folder)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, sorted."""
        return tuple(sorted(self._entries))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, from the header."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as stored, from the header."""
        import torch

        stored: torch.dtype = getattr(torch, DTYPES[self._entry(name).dtype][0])
        return stored

    def get(self, name: str) -> torch.Tensor:
        """One whole tensor on the host, read when asked for; not to be written to.

        Its memory is the file's pages, given back with the last reference to it.
        """
        from safetensors import safe_open

        with safe_open(self._entry(name).file, framework="pt", device="cpu") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor's shape and dtype, in the order of `names`."""
        return {name: TensorInfo(self.shape(name), self.dtype(name)) for name in self.names}

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) in the order of `names`; one tensor is read at a time."""
        for name in self.names:
            yield name, self.get(name)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ModelError(f"{self.folder} holds no tensor {name!r}; it has {len(self._entries)} others")
        return self._entries[name]


def _entries(folder: Path) -> dict[str, _Entry]:
    single, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if single.is_file():  # first, as transformers does where both lie side by side
        return _read_header(single)
    if not index.is_file():
        raise ModelError(f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}; give a Hugging Face model's folder")
    placed = _weight_map(index)
    missing = sorted(file for file in set(placed.values()) if not (folder / file).is_file())
    if missing:
        raise ModelError(f"{index} names {_some(missing)}, not in the folder; it is incomplete, download it again")
    headers = {file: _read_header(folder / file) for file in sorted(set(placed.values()))}
    absent = sorted(name for name, file in placed.items() if name not in headers[file])
    if absent:
        raise ModelError(f"{index} places {_some(absent)} in files that do not hold them; download the model again")
    return {name: headers[file][name] for name, file in placed.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        plain = all(isinstance(file, str) and Path(file).name == file for file in placed.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is not an index of safetensors ({error!r}); download it again") from error
    if not plain:
        raise ModelError(f"{index} names files outside its folder; such an index is not read")
    return dict(placed)


def _read_header(file: Path) -> dict[str, _Entry]:
    """The header of one file: 8 bytes length, JSON, then data that must end where the header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise ModelError(f"{file} ({size} bytes) is truncated or not a safetensors file; download it again")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {name: _Entry(file, tuple(value["shape"]), value["dtype"]) for name, value in header.items()}
        spans = {name: value["data_offsets"] for name, value in header.items()}
        end = max((stop for _, stop in spans.values()), default=0)
        wrong = [name for name, (start, stop) in spans.items() if stop - start != _bytes(entries[name])]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file} has a header that cannot be read ({error!r}); download it again") from error
    if wrong:
        raise ModelError(f"{file}: the sizes of {_some(wrong)} do not fit their shapes; download it again")
    if size != 8 + length + end:
        raise ModelError(f"{file} has {size} bytes, its header asks for {8 + length + end}; download it again")
    return entries


def _bytes(entry: _Entry) -> int:
    return math.prod(entry.shape) * DTYPES[entry.dtype][1]


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
