"""Hugging Face names <-> megatron-core parameters: one rule a parameter, in one visible table.

A rule turns whole Hugging Face tensors into one rank's shard, and the shards of a tensor group back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_vlrl.models.hf_files import HFWeights
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec, TextSpec
from megatron_vlrl.models.qwen3_vl.names import EXPERTS_DOWN, EXPERTS_GATE_UP, TEXT, VISION

Shape = tuple[int, ...]

EMBEDDING = "language_model.embedding.word_embeddings.weight"
# Where embeddings are tied, this is the last pipeline stage's copy of the table, and has no rule of its own.
HEAD = "language_model.output_layer.weight"


class Layout(Protocol):
    """How one parameter is cut over the tensor group."""

    def shard(self, whole: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Rank `rank`'s part of the parameter made of the Hugging Face tensors `whole`."""
        ...

    def join(self, shards: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """The Hugging Face tensors, of `shapes`, from every rank's part."""
        ...


@dataclass(frozen=True, slots=True)
class Replicated:
    """The same on every rank; `flat` where Hugging Face keeps the patch convolution's kernel shape."""

    def shard(self, whole: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """The tensor, its trailing dimensions flattened to a matrix where it has more than two."""
        return whole[0].flatten(1) if whole[0].dim() > 2 else whole[0]

    def join(self, shards: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """Rank 0's copy."""
        return [shards[0].view(shapes[0])]


@dataclass(frozen=True, slots=True)
class Split:
    """Cut along one dimension: 0 for column-parallel layers and the vocabulary, 1 for row-parallel layers."""

    dim: int

    def shard(self, whole: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """The rank's chunk."""
        return whole[0].chunk(size, self.dim)[rank]

    def join(self, shards: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """Chunks one after the other; a single one is not copied."""
        return [_joined(shards, self.dim)]


@dataclass(frozen=True, slots=True)
class QKV:
    """q, k and v in one matrix, in the order of megatron-core: for each key/value head its queries, key and value."""

    kv_heads: int

    def shard(self, whole: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Rows of the rank's key/value heads."""
        parts = [part.view(self.kv_heads, -1, part.size(-1)).chunk(size)[rank] for part in whole]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def join(self, shards: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """q, k, v."""
        rows = [shape[0] // self.kv_heads for shape in shapes]
        merged = _joined(shards).view(self.kv_heads, sum(rows), -1)
        return [part.reshape(shape) for part, shape in zip(merged.split(rows, dim=1), shapes, strict=True)]


@dataclass(frozen=True, slots=True)
class FusedQKV:
    """The vision tower's fused matrix (or bias): [3, heads, ...] there, [heads, 3, ...] in megatron-core."""

    heads: int

    def shard(self, whole: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Rows of the rank's heads."""
        tensor = whole[0]
        by_head = tensor.view(3, self.heads, -1, *tensor.shape[1:]).transpose(0, 1)
        return by_head.chunk(size)[rank].flatten(0, 2)

    def join(self, shards: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """The fused tensor."""
        merged = _joined(shards)
        by_head = merged.view(self.heads, 3, -1, *merged.shape[1:])
        return [by_head.transpose(0, 1).reshape(shapes[0])]


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """gate and up in one matrix; each rank holds [its gate; its up]."""

    def shard(self, whole: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """The rank's chunk of both."""
        return _joined([part.chunk(size)[rank] for part in whole])

    def join(self, shards: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """gate, up."""
        halves = [shard.chunk(2) for shard in shards]
        return [_joined([half[index] for half in halves]) for index in (0, 1)]


@dataclass(frozen=True, slots=True)
class FusedGate:
    """`GatedMLP`, where gate and up are one tensor at Hugging Face too."""

    def shard(self, whole: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """The rank's chunk of both halves."""
        return GatedMLP().shard(whole[0].chunk(2), rank, size)

    def join(self, shards: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """[gate; up]."""
        return [torch.cat(GatedMLP().join(shards, shapes))]


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return torch.cat(list(parts), dim) if len(parts) > 1 else parts[0]


@dataclass(frozen=True, slots=True)
class EitherWay:
    """One expert's matrix, [out, in] inside; some folders hold its transpose (see `as_stored`)."""

    shape: Shape
    inside: Layout

    def shard(self, whole: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """The rank's part of the upright matrix."""
        upright = whole[0] if tuple(whole[0].shape) == self.shape else whole[0].T
        return self.inside.shard([upright], rank, size)

    def join(self, shards: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """The matrix, transposed where `shapes` say so."""
        (upright,) = self.inside.join(shards, [self.shape])
        return [upright if tuple(shapes[0]) == self.shape else upright.T]


@dataclass(frozen=True, slots=True)
class Rule:
    """`local`: the parameter's name in the whole model (layers and experts numbered from 0). `hf`: the tensors it is
    made of. `expert`: which row of theirs, where they stack all experts; the layout is then that of the row."""

    local: str
    hf: tuple[str, ...]
    layout: Layout
    expert: int | None = None

    def read(self, weights: HFWeights) -> list[Tensor]:
        """What the parameter is made of, out of a folder."""
        if self.expert is None:
            return [weights.get(name) for name in self.hf]
        return [weights.get(name)[self.expert] for name in self.hf]

    def shapes(self, shapes: Mapping[str, Shape]) -> list[Shape]:
        """Of what the parameter is made of."""
        return [tuple(shapes[name]) if self.expert is None else tuple(shapes[name])[1:] for name in self.hf]


def by_hf_name(
    joined: Iterable[tuple[Rule, Sequence[Tensor]]], shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) from each rule's tensors, in the rules' order.

    The experts of a layer follow each other and are put together one by one into the tensor that holds them all.
    """
    for rule, whole in joined:
        if rule.expert is None:
            yield from zip(rule.hf, whole, strict=True)
            continue
        (name,), (row,) = rule.hf, whole
        if rule.expert == 0:
            stack = row.new_empty(shapes[name])
        stack[rule.expert] = row
        if rule.expert == len(stack) - 1:
            yield name, stack


def rules(spec: Qwen3VLSpec) -> list[Rule]:
    """Every parameter, in the order in which weights are exported."""
    model = "language_model."
    table = [Rule(EMBEDDING, (f"{TEXT}embed_tokens.weight",), Split(0))]
    for layer in range(spec.text.layers):
        local, hf = f"{model}decoder.layers.{layer}.", f"{TEXT}layers.{layer}."
        table += _text_layer(spec, local, hf)
        table += _experts(spec.text, local, hf) if spec.text.is_mixture(layer) else _mlp(local, hf)
    table.append(Rule(f"{model}decoder.final_layernorm.weight", (f"{TEXT}norm.weight",), Replicated()))
    if not spec.tied_embeddings:
        table.append(Rule(HEAD, ("lm_head.weight",), Split(0)))
    return table + _vision(spec)


def _text_layer(spec: Qwen3VLSpec, local: str, hf: str) -> list[Rule]:
    copied = {
        "input_layernorm": "input_layernorm",
        "self_attention.q_layernorm": "self_attn.q_norm",
        "self_attention.k_layernorm": "self_attn.k_norm",
        "pre_mlp_layernorm": "post_attention_layernorm",
    }
    qkv = tuple(f"{hf}self_attn.{part}_proj.weight" for part in "qkv")
    return [
        *(Rule(f"{local}{mine}.weight", (f"{hf}{theirs}.weight",), Replicated()) for mine, theirs in copied.items()),
        Rule(f"{local}self_attention.linear_qkv.weight", qkv, QKV(spec.text.kv_heads)),
        Rule(f"{local}self_attention.linear_proj.weight", (f"{hf}self_attn.o_proj.weight",), Split(1)),
    ]


def _mlp(local: str, hf: str) -> list[Rule]:
    return [
        Rule(f"{local}mlp.linear_fc1.weight", (f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight"), GatedMLP()),
        Rule(f"{local}mlp.linear_fc2.weight", (f"{hf}mlp.down_proj.weight",), Split(1)),
    ]


def _experts(text: TextSpec, local: str, hf: str) -> list[Rule]:
    """The experts of a tensor follow each other, from 0."""
    width, hidden = text.expert_ffn_size, text.hidden_size
    gate_up, down = EitherWay((2 * width, hidden), FusedGate()), EitherWay((hidden, width), Split(1))
    table = [Rule(f"{local}mlp.router.weight", (f"{hf}mlp.gate.weight",), Replicated())]
    for linear, name, layout in (("linear_fc1", EXPERTS_GATE_UP, gate_up), ("linear_fc2", EXPERTS_DOWN, down)):
        for n in range(text.experts):
            table.append(Rule(f"{local}mlp.experts.local_experts.{n}.{linear}.weight", (hf + name,), layout, expert=n))
    return table


def _vision(spec: Qwen3VLSpec) -> list[Rule]:
    model = "vision_model."
    heads = spec.vision.heads
    layer_layouts: list[tuple[str, str, Layout]] = [
        ("input_layernorm.weight", "norm1.weight", Replicated()),
        ("input_layernorm.bias", "norm1.bias", Replicated()),
        ("pre_mlp_layernorm.weight", "norm2.weight", Replicated()),
        ("pre_mlp_layernorm.bias", "norm2.bias", Replicated()),
        ("self_attention.linear_qkv.weight", "attn.qkv.weight", FusedQKV(heads)),
        ("self_attention.linear_qkv.bias", "attn.qkv.bias", FusedQKV(heads)),
        ("self_attention.linear_proj.weight", "attn.proj.weight", Split(1)),
        ("self_attention.linear_proj.bias", "attn.proj.bias", Replicated()),
        ("mlp.linear_fc1.weight", "mlp.linear_fc1.weight", Split(0)),
        ("mlp.linear_fc1.bias", "mlp.linear_fc1.bias", Split(0)),
        ("mlp.linear_fc2.weight", "mlp.linear_fc2.weight", Split(1)),
        ("mlp.linear_fc2.bias", "mlp.linear_fc2.bias", Replicated()),
    ]
    table = [
        Rule(f"{model}patch_embed.weight", (f"{VISION}patch_embed.proj.weight",), Replicated()),
        Rule(f"{model}patch_embed.bias", (f"{VISION}patch_embed.proj.bias",), Replicated()),
        Rule(f"{model}pos_embed.weight", (f"{VISION}pos_embed.weight",), Replicated()),
    ]
    for layer in range(spec.vision.depth):
        for mine, theirs, layout in layer_layouts:
            table.append(Rule(f"{model}layers.{layer}.{mine}", (f"{VISION}blocks.{layer}.{theirs}",), layout))
    mergers = ["merger", *(f"deepstack_merger_list.{index}" for index in range(len(spec.vision.deepstack_layers)))]
    parts = [f"{module}.{kind}" for module in ("norm", "linear_fc1", "linear_fc2") for kind in ("weight", "bias")]
    for merger in mergers:
        table += [Rule(f"{model}{merger}.{part}", (f"{VISION}{merger}.{part}",), Replicated()) for part in parts]
    return table
