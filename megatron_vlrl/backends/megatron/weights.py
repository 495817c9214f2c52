"""Weights and gradients of a parallel model by Hugging Face name: in from a folder, out gathered in bounded buckets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_vlrl.backends.megatron.names import EMBEDDING, HEAD, Rule, by_hf_name
from megatron_vlrl.errors import ModelError
from megatron_vlrl.models.hf_files import HFWeights
from megatron_vlrl.models.qwen3_vl.names import as_stored
from megatron_vlrl.parallel.collectives import gather_objects
from megatron_vlrl.parallel.groups import Group, ProcessGroups

BUCKET_BYTES = 64 * 2**20
Shapes = Mapping[str, tuple[int, ...]]


def parameters_by_global_name(chunks: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """This rank's parameters by their names in the whole model, where layers are numbered through all stages and
    experts through all ranks."""
    prefix = "language_model.decoder.layers."
    named = {}
    for stage, name, parameter in ((chunk, *item) for chunk in chunks for item in chunk.named_parameters()):
        if name.startswith(prefix):
            index, rest = name.removeprefix(prefix).split(".", 1)
            layer: Any = stage.get_submodule(prefix + index)
            named[f"{prefix}{layer.layer_number - 1}.{_global_expert(layer, rest)}"] = parameter
        else:
            named[name] = parameter
    return named


def _global_expert(layer: Any, name: str) -> str:
    """A layer's parameter name, with an expert's place on this rank made its place among all."""
    prefix = "mlp.experts.local_experts."
    if not name.startswith(prefix):
        return name
    index, rest = name.removeprefix(prefix).split(".", 1)
    return f"{prefix}{layer.mlp.local_expert_indices[int(index)]}.{rest}"


class Holder(NamedTuple):
    """Who has a parameter: the first pipeline rank, and the rank of the expert group, where not all have it."""

    pipeline: int
    expert: int | None


@dataclass(frozen=True, slots=True)
class WeightMap:
    """The rules, the shapes of the Hugging Face tensors, and which pipeline stage holds each parameter first."""

    rules: tuple[Rule, ...]
    shapes: Shapes
    parameters: Mapping[str, nn.Parameter]
    owner: Mapping[str, int]
    groups: ProcessGroups

    @classmethod
    def build(
        cls, rules: Sequence[Rule], shapes: Shapes, chunks: Sequence[nn.Module], groups: ProcessGroups
    ) -> WeightMap:
        """Find the owners; collective over the pipeline and expert groups."""
        parameters = parameters_by_global_name(chunks)
        everyone = gather_objects(gather_objects(sorted(parameters), groups.pipeline), groups.expert)
        held = [{name for names in stage for name in names} for stage in zip(*everyone, strict=True)]
        owner = {name: rank for rank, names in reversed(list(enumerate(held))) for name in names}
        known = {rule.local for rule in rules} | {HEAD}
        strange = sorted(set(owner) - known) + sorted(rule.local for rule in rules if rule.local not in owner)
        if strange:
            raise ModelError(f"parameters and the name table disagree on {strange}")
        return cls(tuple(rules), shapes, parameters, owner, groups)

    def load(self, weights: HFWeights) -> None:
        """Copy this rank's shards out of a Hugging Face folder."""
        stored = {name: weights.shape(name) for name in weights.names}
        check_complete(weights, as_stored(dict(self.shapes), stored))
        tensor = self.groups.tensor
        by_local = {rule.local: rule for rule in self.rules}
        by_local.setdefault(HEAD, by_local[EMBEDDING])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                rule = by_local[name]
                parameter.copy_(rule.layout.shard(rule.read(weights), tensor.rank, tensor.size))

    def gather(self, pick: Callable[[nn.Parameter], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor on the host) of `pick(parameter)`, on every rank; collective."""
        joined = (item for holder, bucket in self._buckets() for item in self._gather_bucket(holder, bucket, pick))
        return by_hf_name(joined, self.shapes)

    def _buckets(self) -> Iterator[tuple[Holder, list[Rule]]]:
        """Runs of rules with one holder, each below BUCKET_BYTES of float32."""
        bucket: list[Rule] = []
        size = 0
        for rule in self.rules:
            nbytes = 4 * sum(_numel(shape) for shape in rule.shapes(self.shapes))
            if bucket and (self._holder(bucket[0]) != self._holder(rule) or size + nbytes > BUCKET_BYTES):
                yield self._holder(bucket[0]), bucket
                bucket, size = [], 0
            bucket.append(rule)
            size += nbytes
        if bucket:
            yield self._holder(bucket[0]), bucket

    def _holder(self, rule: Rule) -> Holder:
        if rule.expert is None or self.groups.expert.size == 1:
            return Holder(self.owner[rule.local], None)
        each = self.shapes[rule.hf[0]][0] // self.groups.expert.size
        return Holder(self.owner[rule.local], rule.expert // each)

    def _gather_bucket(
        self, holder: Holder, bucket: Sequence[Rule], pick: Callable[[nn.Parameter], Tensor]
    ) -> Iterator[tuple[Rule, list[Tensor]]]:
        tensor, pipeline, expert = self.groups.tensor, self.groups.pipeline, self.groups.expert
        has_experts = holder.expert in (None, expert.rank)
        local_shapes = [self._local_shape(rule) for rule in bucket]
        sizes = [_numel(shape) for shape in local_shapes]
        if pipeline.rank == holder.pipeline and has_experts:
            flat = torch.cat([pick(self.parameters[rule.local]).detach().flatten() for rule in bucket])
            shards = _all_gather(flat, tensor)
        else:
            sample = pick(next(iter(self.parameters.values())))
            shards = [torch.empty(sum(sizes), dtype=sample.dtype, device=sample.device) for _ in range(tensor.size)]
        for shard in shards:
            if pipeline.size > 1 and has_experts:
                dist.broadcast(shard, group=pipeline.handle, group_src=holder.pipeline)
            if holder.expert is not None:
                dist.broadcast(shard, group=expert.handle, group_src=holder.expert)
        split = [shard.cpu().split(sizes) for shard in shards]
        for index, (rule, shape) in enumerate(zip(bucket, local_shapes, strict=True)):
            parts = [pieces[index].view(shape) for pieces in split]
            whole = rule.layout.join(parts, rule.shapes(self.shapes))
            yield rule, [part.contiguous() for part in whole]

    def _local_shape(self, rule: Rule) -> tuple[int, ...]:
        """Shape of one rank's shard, without its data."""
        whole = [torch.empty(shape, device="meta") for shape in rule.shapes(self.shapes)]
        return tuple(rule.layout.shard(whole, 0, self.groups.tensor.size).shape)


def check_complete(weights: HFWeights, shapes: Shapes) -> None:
    """Raise ModelError listing every missing, extra or misshapen tensor."""
    names = set(weights.names)
    missing = sorted(set(shapes) - names)
    extra = sorted(names - set(shapes))
    wrong = [
        f"{name} is {list(weights.shape(name))}, expected {list(shapes[name])}"
        for name in sorted(names & set(shapes))
        if tuple(weights.shape(name)) != tuple(shapes[name])
    ]
    if missing or extra or wrong:
        raise ModelError(f"the weights do not fit the config: missing {missing}; extra {extra}; misshapen {wrong}")


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _all_gather(flat: Tensor, group: Group) -> list[Tensor]:
    if group.size == 1:
        return [flat]
    shards = [torch.empty_like(flat) for _ in range(group.size)]
    dist.all_gather(shards, flat, group=group.handle)
    return shards
