"""Which layouts of a model fit on some devices, and which of them to try first; torch-free.

In: model, devices, lengths of a step. Out: layouts by their estimated cost, and refusals with their numbers. The cost
is a rule of thumb for this order alone, no prediction of speed: 1 is a step without recompute, communication inside
layers, pipeline bubble or idle replicas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_vlrl.backends.activations import Recompute, Row
from megatron_vlrl.backends.devices import Device
from megatron_vlrl.backends.layout import check_layout
from megatron_vlrl.backends.memory import RankMemory, Training, fullest_rank
from megatron_vlrl.errors import ConfigError
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.models.qwen3_vl.sizes import parameter_counts
from megatron_vlrl.parallel.dims import ParallelDims

GIB = 2**30
USABLE = 0.9  # of a device: the rest is for its runtime, communication buffers and fragmentation
_DOUBLING = 1.05  # cost of each doubling of the tensor or expert degree inside a machine
_RECOMPUTES: tuple[tuple[Recompute, bool], ...] = (
    ("none", False),
    ("none", True),
    ("selective", False),
    ("selective", True),
    ("full", False),
    ("full", True),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Lengths of a step: `group` answers of `response` tokens to each of `prompts` prompts of `prompt` tokens, `image`
    of them from images; `budget` packed tokens of a microbatch."""

    prompts: int
    prompt: int
    image: int
    group: int
    response: int
    budget: int

    def row(self, data: int) -> Row:
        """A microbatch of one of `data` replicas."""
        row = Row.fill(self.budget, prompt=self.prompt, image=self.image, responses=self.group, response=self.response)
        return replace(row, prompts=min(row.prompts, math.ceil(self.prompts / data)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Degrees and recompute, the memory of its fullest rank, and its cost with what it is made of."""

    dims: ParallelDims
    training: Training
    memory: RankMemory
    cost: float
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """layouts: what fits, best first. too_large: what does not fit even with the recompute that needs least, the
    nearest first. impossible: degrees that the model or the machines do not allow, and why. limit: bytes of a device
    that may be used."""

    layouts: tuple[Layout, ...]
    too_large: tuple[Layout, ...]
    impossible: tuple[str, ...]
    limit: float


def make_plan(spec: Qwen3VLSpec, devices: int, device: Device, work: Work, training: Training) -> Plan:
    """Every layout of `devices` devices, each with the cheapest recompute that fits; `training` gives the rest."""
    limit = device.memory * GIB * USABLE
    layouts, too_large = [], []
    degrees, impossible = _possible(spec, devices, device)
    for dims in degrees:
        tries = [
            _layout(spec, dims, work, replace(training, recompute=text, recompute_vision=vision))
            for text, vision in _RECOMPUTES
        ]
        fitting = [layout for layout in tries if layout.memory.total <= limit]
        if fitting:
            layouts.append(min(fitting, key=lambda layout: layout.cost))
        else:
            too_large.append(min(tries, key=lambda layout: layout.memory.total))
    return Plan(
        layouts=tuple(sorted(layouts, key=lambda layout: (layout.cost, layout.memory.total))),
        too_large=tuple(sorted(too_large, key=lambda layout: layout.memory.total)),
        impossible=tuple(impossible),
        limit=limit,
    )


def _possible(spec: Qwen3VLSpec, devices: int, device: Device) -> tuple[list[ParallelDims], list[str]]:
    """Degrees that the model can be cut by, and why others are not; each degree is looked at by itself."""
    problems = []

    def allowed(name: str) -> Iterator[int]:
        for degree in _divisors(devices):
            dims = {name: degree} | ({"data": devices} if name == "expert" else {})
            try:
                check_layout(spec, ParallelDims(sequence=True, **dims))
            except ConfigError as error:
                problems.append(str(error).rpartition(" (")[0])
                continue
            if name == "tensor" and degree > device.machine:
                problems.append(
                    f"parallel.tensor={degree} reaches over machines of {device.machine} devices, and every layer "
                    "would wait for the links between them; use pipeline or data instead"
                )
                continue
            yield degree

    tensors, pipelines = list(allowed("tensor")), list(allowed("pipeline"))
    experts = list(allowed("expert")) if spec.text.experts else [1]
    degrees = [
        ParallelDims(tensor=tensor, pipeline=pipeline, data=data, expert=expert, sequence=tensor > 1)
        for tensor in tensors
        for pipeline in pipelines
        if devices % (tensor * pipeline) == 0
        for data in [devices // (tensor * pipeline)]
        for expert in experts
        if data % expert == 0
    ]
    return degrees, problems


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _layout(spec: Qwen3VLSpec, dims: ParallelDims, work: Work, training: Training) -> Layout:
    row = work.row(dims.data)
    factors = _costs(spec, dims, work, row, training)
    return Layout(
        dims=dims,
        training=training,
        memory=fullest_rank(spec, dims, row, training),
        cost=math.prod(factors.values()),
        reasons=tuple(f"{name} x{factor:.2f}" for name, factor in factors.items()),
    )


def _costs(spec: Qwen3VLSpec, dims: ParallelDims, work: Work, row: Row, training: Training) -> dict[str, float]:
    """What makes a step dearer -> by which factor. A forward pass is a third of a step."""
    factors = {"recompute": 1 + _again(spec, row, training) / 3}
    factors["tensor"] = _DOUBLING ** math.log2(dims.tensor)
    factors["expert"] = _DOUBLING ** math.log2(dims.expert)
    microbatches = math.ceil(work.prompts / (dims.data * row.prompts))
    factors["bubble"] = (microbatches + dims.pipeline - 1) / microbatches
    factors["idle"] = microbatches * row.prompts * dims.data / work.prompts
    return {name: factor for name, factor in factors.items() if factor > 1.005}


def _again(spec: Qwen3VLSpec, row: Row, training: Training) -> float:
    """Share of the forward pass that is computed again."""
    text = spec.text
    active, tower = _active_parameters(spec)
    layers = 2 * row.tokens * active
    core = 4 * row.tokens * text.layers * text.heads * text.head_dim * (row.prompt + row.response) / 2
    vision = 2 * row.prompts * row.image * spec.vision.merge_size**2 * tower
    head = 2 * row.logit_rows * text.vocab_size * text.hidden_size
    again = {"none": 0.0, "selective": core, "full": layers + core}[training.recompute]
    return (again + (vision if training.recompute_vision else 0)) / (layers + core + vision + head)


@lru_cache
def _active_parameters(spec: Qwen3VLSpec) -> tuple[int, int]:
    """(numbers of the decoder layers that one token meets, numbers of the vision tower's layers)."""
    counts, text = parameter_counts(spec), spec.text
    mixtures = sum(text.is_mixture(layer) for layer in range(text.layers))
    unmet = mixtures * (text.experts - text.experts_per_token) * 3 * text.hidden_size * text.expert_ffn_size
    return counts["layers"] - unmet, counts["vision"]
