"""Hugging Face weights -> a checkpoint's shards, one parameter at a time, in one process, with no model built.

In: the name table, the spec, the degrees. Out: the files that `dist_checkpointing.load` reads at any layout
(torch_dist: blocks of tensors one after the other in a file for each rank, and `.metadata` with the place of each).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_vlrl.backends.megatron.names import EitherWay, FusedGate, GatedMLP, Layout, Rule, rules
from megatron_vlrl.models.hf_files import HFWeights
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.models.qwen3_vl.names import hf_shapes
from megatron_vlrl.parallel.dims import ParallelDims

WEIGHTS_ONLY = "weights_only"  # among what a checkpoint's ranks have in common: no optimizer, no random state
SHARD_SUFFIX = ".distcp"  # of the files that hold tensors
_COMMON_FILE = "common.pt"
_LAYERS = "language_model.decoder.layers."
_EXPERTS = "mlp.experts.local_experts."
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredParameter:
    """One parameter as a checkpoint keeps it. key: its name there.

    Layers, and the experts of a layer, share a key where all are alike: `index` is this one's place in the key's
    first dimensions, of `counts`. shape: of the whole parameter, without those. layer: its layer, None outside them.
    """

    rule: Rule
    key: str
    index: Shape
    counts: Shape
    shape: Shape
    layer: int | None


def stored_parameters(spec: Qwen3VLSpec) -> list[StoredParameter]:
    """Every parameter, in the order of the name table."""
    text, shapes = spec.text, hf_shapes(spec)
    alike = len({text.is_mixture(layer) for layer in range(text.layers)}) == 1
    found = []
    for rule in rules(spec):
        meta = [torch.empty(shape, device="meta") for shape in rule.shapes(shapes)]
        key, index, counts, layer = rule.local, [], [], None
        if key.startswith(_LAYERS):
            number, rest = key.removeprefix(_LAYERS).split(".", 1)
            layer = int(number)
            if alike:
                key, index, counts = _LAYERS + rest, [layer], [text.layers]
        if rule.expert is not None:
            key = key.replace(f"{_EXPERTS}{rule.expert}.", "mlp.experts.experts.")
            index, counts = [*index, rule.expert], [*counts, text.experts]
        found.append(
            StoredParameter(
                rule=rule,
                key=key,
                index=tuple(index),
                counts=tuple(counts),
                shape=tuple(rule.layout.shard(meta, 0, 1).shape),
                layer=layer,
            )
        )
    return found


def shard_names(dims: ParallelDims) -> list[str]:
    """The file of each rank, of one data rank."""
    return [f"__{rank}_0{SHARD_SUFFIX}" for rank in range(dims.tensor * dims.expert * dims.pipeline)]


def write_shards(folder: Path, weights: HFWeights, spec: Qwen3VLSpec, dims: ParallelDims) -> None:
    """Write the weights into the empty `folder` as the ranks of `dims` would, each its own blocks in its own file.

    The weights must be complete and of one dtype. In memory: one parameter and one shard of it. The files of
    `shard_names` are only appended to.
    """
    entries: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    with ExitStack() as stack:
        # torch never looks at these sums when it loads, and the checkpoint's manifest has better ones.
        stack.callback(set_crc32_options, get_crc32_options())
        set_crc32_options(False)
        names = shard_names(dims)
        files = [stack.enter_context((folder / name).open("wb")) for name in names]
        for parameter in stored_parameters(spec):
            first = _first_rank(parameter, spec, dims)
            for rank, inner, part in _blocks(parameter, weights, dims.tensor):
                offset = torch.Size((*parameter.index, *inner))
                block = part.view(*(1 for _ in parameter.index), *part.shape)
                start, length = _append(files[first + rank], block)
                places[MetadataIndex(parameter.key, offset)] = _StorageInfo(names[first + rank], start, length)
                size = torch.Size((*parameter.counts, *parameter.shape))
                entry = TensorStorageMetadata(TensorProperties(dtype=block.dtype), size, [])
                entries.setdefault(parameter.key, entry).chunks.append(ChunkStorageMetadata(offset, block.size()))
    _finish(folder, entries, places)


def _finish(
    folder: Path, entries: Mapping[str, TensorStorageMetadata], places: Mapping[MetadataIndex, _StorageInfo]
) -> None:
    metadata = Metadata(state_dict_metadata=dict(entries), storage_data=dict(places), version=CURRENT_DCP_VERSION)
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    torch.save({WEIGHTS_ONLY: True}, folder / _COMMON_FILE)
    (folder / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")


def _blocks(parameter: StoredParameter, weights: HFWeights, ranks: int) -> Iterator[tuple[int, Shape, Tensor]]:
    """(tensor rank, offset in the whole parameter, block) of everything that is stored, one copy of what is equal."""
    whole = parameter.rule.read(weights)
    for rank in range(ranks):
        parts = _parts(parameter.rule.layout, whole, rank, ranks)
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        if rank and shape == parameter.shape:
            return  # the same on every rank
        cut = [rank * mine if mine < all_ else 0 for mine, all_ in zip(shape, parameter.shape, strict=True)]
        for number, part in enumerate(parts):
            inner = (number * (parameter.shape[0] // len(parts)) + cut[0] // len(parts), *cut[1:])
            yield rank, inner, part.contiguous()


def _parts(layout: Layout, whole: Sequence[Tensor], rank: int, ranks: int) -> Sequence[Tensor]:
    """A rank's shard: one block, or gate and up, which lie one after the other, each cut over the ranks."""
    if isinstance(layout, GatedMLP):
        return [layout.shard([part], rank, ranks) for part in whole]  # not joined first, only to be cut again
    local = layout.shard(whole, rank, ranks)
    gated = isinstance(layout.inside if isinstance(layout, EitherWay) else layout, FusedGate)
    return local.chunk(2) if gated else [local]


def _first_rank(parameter: StoredParameter, spec: Qwen3VLSpec, dims: ParallelDims) -> int:
    """The first rank of the tensor group that holds a parameter."""
    if parameter.layer is not None:
        stage = parameter.layer * dims.pipeline // spec.text.layers
    else:
        at_end = parameter.key.startswith(("language_model.decoder.", "language_model.output_layer."))
        stage = dims.pipeline - 1 if at_end else 0
    sharer = (parameter.rule.expert or 0) * dims.expert // max(spec.text.experts, 1)
    return (stage * dims.expert + sharer) * dims.tensor


def _append(file: BinaryIO, block: Tensor) -> tuple[int, int]:
    """(start, length) of what was written."""
    # torch.save writes the whole memory behind a tensor: here, that of the block alone.
    alone = torch.frombuffer(block.view(-1).view(torch.uint8).numpy(), dtype=block.dtype).view(block.shape)
    start = file.tell()
    torch.save(alone, file)
    return start, file.tell() - start
