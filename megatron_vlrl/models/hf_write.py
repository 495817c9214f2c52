"""Named tensors -> safetensors with an index, one tensor in memory at a time.

In: shapes and dtypes of all, then the tensors in any order. Out: `model.safetensors`, or numbered files and their
index. The headers are written first, from the shapes; each tensor then goes straight to its place.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_vlrl.models.hf_files import DTYPES, INDEX_NAME, WEIGHTS_NAME, TensorInfo

_CODES = {getattr(torch, name): code for code, (name, _) in DTYPES.items()}
_ALIGNMENT = 8  # bytes; where the data of a file begins


@dataclass(frozen=True, slots=True)
class _Place:
    """file: number of the output file. start: of the tensor's bytes in it."""

    file: int
    start: int


def write_safetensors(
    folder: Path, weights: Iterator[tuple[str, Tensor]], expected: Mapping[str, TensorInfo], shard_bytes: float
) -> None:
    """Write every tensor of `expected` into `folder`; files of at most `shard_bytes`, unless one tensor is larger.

    weights: each name of `expected` once, with its shape and dtype, on the host.
    """
    groups = _group(expected, shard_bytes)
    names = _file_names(len(groups))
    places: dict[str, _Place] = {}
    with ExitStack() as stack:
        files: list[BinaryIO] = []
        for number, group in enumerate(groups):
            file = stack.enter_context((folder / names[number]).open("wb"))
            files.append(file)
            places |= {name: _Place(number, start) for name, start in _begin(file, group, expected).items()}
        for name, tensor in weights:
            target = files[places[name].file]
            target.seek(places[name].start)
            target.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    if len(groups) > 1:
        total = sum(_bytes(info) for info in expected.values())
        placed = {name: names[place.file] for name, place in sorted(places.items())}
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _group(expected: Mapping[str, TensorInfo], shard_bytes: float) -> list[list[str]]:
    """Names for each file, in the order of `expected`."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, info in expected.items():
        if groups[-1] and held + _bytes(info) > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += _bytes(info)
    return groups


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS_NAME]
    return [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]


def _begin(file: BinaryIO, names: list[str], expected: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Write the header of one file and make room for the rest; where each tensor starts.

    Wide numbers come first, as the format's own library has it, so that every tensor is aligned to its dtype.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name in sorted(names, key=lambda name: (-expected[name].dtype.itemsize, name)):
        info = expected[name]
        starts[name] = end
        end += _bytes(info)
        header[name] = {
            "dtype": _CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [starts[name], end],
        }
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    file.write(len(raw).to_bytes(8, "little") + raw)
    _make_room(file.fileno(), 8 + len(raw) + end)
    return {name: 8 + len(raw) + start for name, start in starts.items()}


def _make_room(file: int, size: int) -> None:
    """Have the disk set aside what a file will take, where it can: it is cheaper to fill, and a lack shows at once."""
    if sys.platform != "linux":
        return
    # Not os.posix_fallocate: where the file system cannot, that one writes to every single block.
    allocate = ctypes.CDLL(None, use_errno=True).fallocate
    allocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if allocate(file, 0, 0, size):
        error = ctypes.get_errno()
        if error not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(error, os.strerror(error))


def _bytes(info: TensorInfo) -> int:
    return torch.Size(info.shape).numel() * info.dtype.itemsize
