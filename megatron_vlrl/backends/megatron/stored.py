"""A checkpoint's weights by Hugging Face name, one parameter at a time, in one process, with no model built.

In: the folder of a checkpoint that ranks saved, or `shards.write_shards`. Out: whole tensors, as stored.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_vlrl.backends.megatron.names import by_hf_name
from megatron_vlrl.backends.megatron.shards import StoredParameter, stored_parameters
from megatron_vlrl.errors import CheckpointError
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec

_MODEL = ("language_model.", "vision_model.")  # how the names of weights begin; the rest is the optimizer's

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The weights of one checkpoint. shapes: of the Hugging Face tensors, by name."""

    folder: Path
    shapes: Mapping[str, Shape]
    parameters: Sequence[StoredParameter]
    tensors: Mapping[str, TensorStorageMetadata]
    places: Mapping[MetadataIndex, _StorageInfo]

    @classmethod
    def open(cls, folder: Path, spec: Qwen3VLSpec, shapes: Mapping[str, Shape]) -> StoredWeights:
        """Read what `folder` holds; CheckpointError lists what is missing, too much, or of another shape."""
        try:
            metadata = FileSystemReader(folder).read_metadata()
        except (OSError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(f"{folder} holds no weights that can be read ({error!r})") from error
        tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if key.startswith(_MODEL) and isinstance(entry, TensorStorageMetadata)
        }
        parameters = stored_parameters(spec)
        sizes = {parameter.key: (*parameter.counts, *parameter.shape) for parameter in parameters}
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
        return cls(folder, shapes, parameters, tensors, metadata.storage_data)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor, whose memory the next one may take).

        The experts of a layer are put together one by one.
        """
        chunks = self._chunks()
        # One piece for all of them: asking the system for memory anew costs as much as filling it.
        memory = torch.empty(max(map(self._bytes, self.parameters)), dtype=torch.uint8)
        rules = (parameter.rule for parameter in self.parameters)
        joined = (
            parameter.rule.layout.join([self._read(parameter, chunks, memory)], parameter.rule.shapes(self.shapes))
            for parameter in self.parameters
        )
        return by_hf_name(zip(rules, joined, strict=True), self.shapes)

    def _chunks(self) -> dict[tuple[str, Shape], list[ChunkStorageMetadata]]:
        """The blocks of each parameter, by key and index."""
        found: dict[tuple[str, Shape], list[ChunkStorageMetadata]] = {}
        leading = {parameter.key: len(parameter.index) for parameter in self.parameters}
        for key, entry in self.tensors.items():
            for chunk in entry.chunks:
                found.setdefault((key, tuple(chunk.offsets[: leading[key]])), []).append(chunk)
        return found

    def _dtype(self, parameter: StoredParameter) -> torch.dtype:
        return self.tensors[parameter.key].properties.dtype

    def _bytes(self, parameter: StoredParameter) -> int:
        return torch.Size(parameter.shape).numel() * self._dtype(parameter).itemsize

    def _read(
        self,
        parameter: StoredParameter,
        chunks: Mapping[tuple[str, Shape], Sequence[ChunkStorageMetadata]],
        memory: Tensor,
    ) -> Tensor:
        """The whole parameter, put together from its blocks in `memory`."""
        whole = memory[: self._bytes(parameter)].view(self._dtype(parameter)).view(parameter.shape)
        covered = 0
        for chunk in chunks.get((parameter.key, parameter.index), ()):
            begin, size = (numbers[len(parameter.index) :] for numbers in (chunk.offsets, chunk.sizes))
            target = whole[tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))]
            self._fill(target, self.places[MetadataIndex(parameter.key, chunk.offsets)])
            covered += target.numel()
        if covered != whole.numel():
            raise CheckpointError(f"{self.folder} holds {covered} of {whole.numel()} numbers of {parameter.rule.local}")
        return whole

    def _fill(self, target: Tensor, place: _StorageInfo) -> None:
        """Read a block, straight to where it belongs if its bytes lie there as they do in the file."""
        with (self.folder / place.relative_path).open("rb") as file:
            part = _Part(file, place)
            block: Tensor = torch.load(cast(BinaryIO, part), map_location="meta", weights_only=True)
            memory = block.untyped_storage()
            start = memory._checkpoint_offset
            alike = block.dtype == target.dtype and block.numel() == target.numel()
            whole = memory.nbytes() == target.nbytes and block.is_contiguous() and target.is_contiguous()
            if start is not None and alike and whole:
                part.seek(start)
                if part.readinto(target.view(-1).view(torch.uint8).numpy()) != target.nbytes:
                    raise CheckpointError(f"{self.folder / place.relative_path} ends within a tensor")
            else:
                part.seek(0)
                target.copy_(torch.load(cast(BinaryIO, part), map_location="cpu", weights_only=True).view(target.shape))


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
        count: int = self._file.readinto(view[: max(0, self._length - self.tell())])  # type: ignore[attr-defined]
        return count
