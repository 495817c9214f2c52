"""Hugging Face weights <-> a checkpoint's shards, one parameter at a time, in one process, with no model built.

In: the name table, the spec, the degrees. Out: the files that `dist_checkpointing.load` reads at any layout
(torch_dist: blocks of tensors one after the other in a file for each rank, `.metadata` with the place of each), and
the way back.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_vlrl.backends.megatron.names import GatedMLP, Rule, rules
from megatron_vlrl.errors import CheckpointError
from megatron_vlrl.models.hf_files import HFWeights, TensorInfo
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.models.qwen3_vl.names import hf_shapes
from megatron_vlrl.parallel.dims import ParallelDims

WEIGHTS_ONLY = "weights_only"  # among what a checkpoint's ranks have in common: no optimizer, no random state
_COMMON_FILE = "common.pt"
_STACKED = "language_model.decoder.layers."  # these layers share a name; the layer is the first dimension
_MODEL = ("language_model.", "vision_model.")  # how the names of weights begin; the rest is the optimizer's
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Parameter:
    """One parameter on disk. key: its name there. layer: its index in the first dimension, of `layers`; or None.

    shape: of the whole parameter as one tensor rank would hold it, without that dimension.
    """

    rule: Rule
    key: str
    layer: int | None
    layers: int
    shape: Shape

    @property
    def size(self) -> Shape:
        """What the checkpoint says of `key`."""
        return self.shape if self.layer is None else (self.layers, *self.shape)

    def offset(self, inner: Shape) -> Shape:
        """Place of a block of this parameter in `key`."""
        return inner if self.layer is None else (self.layer, *inner)


def _parameters(spec: Qwen3VLSpec) -> list[_Parameter]:
    shapes = hf_shapes(spec)
    found = []
    for rule in rules(spec):
        whole = rule.layout.shard([torch.empty(shapes[name], device="meta") for name in rule.hf], 0, 1)
        key, layer = rule.local, None
        if key.startswith(_STACKED):
            index, rest = key.removeprefix(_STACKED).split(".", 1)
            key, layer = _STACKED + rest, int(index)
        found.append(_Parameter(rule, key, layer, spec.text.layers, tuple(whole.shape)))
    return found


def write_shards(folder: Path, weights: HFWeights, spec: Qwen3VLSpec, dims: ParallelDims) -> None:
    """Write the weights into the empty `folder` as the ranks of `dims` would, each its own blocks in its own file.

    The weights must be complete and of one dtype. In memory: one parameter and one shard of it.
    """
    ranks = dims.tensor * dims.pipeline
    entries: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    with ExitStack() as stack:
        names = [f"__{rank}_0.distcp" for rank in range(ranks)]
        files = [stack.enter_context((folder / name).open("wb")) for name in names]
        for parameter in _parameters(spec):
            for rank, inner, block in _blocks(parameter, weights, dims.tensor):
                number = _stage(parameter, dims.pipeline) * dims.tensor + rank
                offset = torch.Size(parameter.offset(inner))
                size = block.shape if parameter.layer is None else (1, *block.shape)
                start, length = _append(files[number], block.view(size))
                properties = TensorProperties(dtype=block.dtype)
                entry = TensorStorageMetadata(properties, torch.Size(parameter.size), [])
                entries.setdefault(parameter.key, entry).chunks.append(ChunkStorageMetadata(offset, torch.Size(size)))
                places[MetadataIndex(parameter.key, offset)] = _StorageInfo(names[number], start, length)
    metadata = Metadata(state_dict_metadata=dict(entries), storage_data=places, version=CURRENT_DCP_VERSION)
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    torch.save({WEIGHTS_ONLY: True}, folder / _COMMON_FILE)
    (folder / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")


def _blocks(parameter: _Parameter, weights: HFWeights, ranks: int) -> Iterator[tuple[int, Shape, Tensor]]:
    """(tensor rank, offset in the whole parameter, block) of everything that is stored, one copy of what is equal."""
    whole = [weights.get(name) for name in parameter.rule.hf]
    for rank in range(ranks):
        local = parameter.rule.layout.shard(whole, rank, ranks)
        if rank and local.shape == parameter.shape:
            return  # the same on every rank
        # Gate and up lie one after the other, each cut over the ranks.
        parts = local.chunk(2) if isinstance(parameter.rule.layout, GatedMLP) else (local,)
        for index, part in enumerate(parts):
            first = index * (parameter.shape[0] // len(parts))
            cut = [rank * mine if mine < all_ else 0 for mine, all_ in zip(local.shape, parameter.shape, strict=True)]
            inner = (first + cut[0] // len(parts), *cut[1:])
            # torch.save writes the whole memory behind a tensor: a block needs its own.
            yield rank, inner, part.clone(memory_format=torch.contiguous_format)


def _stage(parameter: _Parameter, stages: int) -> int:
    """The pipeline rank that holds a parameter first."""
    if parameter.layer is not None:
        return parameter.layer * stages // parameter.layers
    last = parameter.key.startswith(("language_model.decoder.", "language_model.output_layer."))
    return stages - 1 if last else 0


def _append(file: BinaryIO, block: Tensor) -> tuple[int, int]:
    """(start, length) of what was written."""
    start = file.tell()
    torch.save(block, file)
    return start, file.tell() - start


def stored_weights(folder: Path, spec: Qwen3VLSpec) -> StoredWeights:
    """The weights of a checkpoint; CheckpointError lists what is missing, too much, or of another shape."""
    try:
        metadata = FileSystemReader(folder).read_metadata()
    except (OSError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{folder} holds no weights that can be read ({error!r})") from error
    tensors = {
        key: entry
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith(_MODEL) and isinstance(entry, TensorStorageMetadata)
    }
    parameters = _parameters(spec)
    sizes = {parameter.key: parameter.size for parameter in parameters}
    missing, extra = sorted(set(sizes) - set(tensors)), sorted(set(tensors) - set(sizes))
    wrong = [
        f"{key} is {list(tensors[key].size)}, expected {list(sizes[key])}"
        for key in sorted(set(sizes) & set(tensors))
        if tuple(tensors[key].size) != sizes[key]
    ]
    if missing or extra or wrong:
        raise CheckpointError(
            f"the weights in {folder} are of another model: missing {missing}; extra {extra}; misshapen {wrong}"
        )
    return StoredWeights(folder, parameters, hf_shapes(spec), tensors, metadata.storage_data)


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """A checkpoint's weights by Hugging Face name, read one parameter at a time."""

    folder: Path
    parameters: Sequence[_Parameter]
    shapes: Mapping[str, Shape]
    tensors: Mapping[str, TensorStorageMetadata]
    places: Mapping[MetadataIndex, _StorageInfo]

    def infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every Hugging Face tensor, as stored."""
        return {
            name: TensorInfo(self.shapes[name], self.tensors[parameter.key].properties.dtype)
            for parameter in self.parameters
            for name in parameter.rule.hf
        }

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor)."""
        for parameter in self.parameters:
            shapes = [self.shapes[name] for name in parameter.rule.hf]
            whole = parameter.rule.layout.join([self._read(parameter)], shapes)
            yield from zip(parameter.rule.hf, whole, strict=True)

    def _read(self, parameter: _Parameter) -> Tensor:
        """The whole parameter, put together from its blocks."""
        entry = self.tensors[parameter.key]
        whole = torch.empty(parameter.shape, dtype=entry.properties.dtype)
        covered = 0
        for chunk in entry.chunks:
            begin, size = tuple(chunk.offsets), tuple(chunk.sizes)
            if parameter.layer is not None and not begin[0] <= parameter.layer < begin[0] + size[0]:
                continue
            block = self._block(self.places[MetadataIndex(parameter.key, chunk.offsets)])
            if parameter.layer is not None:
                block, begin = block[parameter.layer - begin[0]], begin[1:]
            whole[tuple(slice(b, b + n) for b, n in zip(begin, block.shape, strict=True))] = block
            covered += block.numel()
        if covered != whole.numel():
            raise CheckpointError(f"{self.folder} holds {covered} of {whole.numel()} numbers of {parameter.rule.local}")
        return whole

    def _block(self, place: _StorageInfo) -> Tensor:
        with (self.folder / place.relative_path).open("rb") as file:
            block: Tensor = torch.load(_Part(file, place), map_location="cpu", weights_only=True)
        return block


class _Part(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: BinaryIO, place: _StorageInfo) -> None:
        self._file, self._start, self._length = file, place.offset, place.length
        self._file.seek(self._start)

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As a file's."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._length}[whence]
        return self._file.seek(self._start + base + offset) - self._start

    def tell(self) -> int:
        """As a file's."""
        return self._file.tell() - self._start

    def readinto(self, buffer: Any) -> int:
        """As a file's, up to the part's end."""
        view = memoryview(buffer).cast("B")
        count = self._file.readinto(view[: max(0, self._length - self.tell())])  # type: ignore[attr-defined]
        return int(count)
