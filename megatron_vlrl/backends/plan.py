"""Which layouts of a model fit on some devices, and which of them to try first; torch-free.

In: model, devices, lengths of a step. Out: layouts by their estimated cost, and refusals with their numbers. The cost
is a rule of thumb for this order alone, no prediction of speed: 1 is a step without recompute, communication, pipeline
bubble, or ranks that wait for others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from megatron_vlrl.backends.activations import Recompute, Row
from megatron_vlrl.backends.devices import Device
from megatron_vlrl.backends.layout import check_layout
from megatron_vlrl.backends.memory import RankMemory, Training, fullest_rank
from megatron_vlrl.backends.pipeline import scheduled
from megatron_vlrl.errors import ConfigError
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.models.qwen3_vl.cost import ForwardCosts, forward_costs, unit_costs
from megatron_vlrl.parallel.dims import ParallelDims

GIB = 2**30
USABLE = 0.9  # of a device: the rest is for its runtime, communication buffers and fragmentation
_DOUBLING = 1.05  # cost of each doubling of the tensor or expert degree inside a machine
_BORDER = 0.05  # of a decoder layer's time: handing its rows to the next pipeline stage
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
    """Every layout of `devices` devices, each with the cheapest interleaving and recompute that fit; `training` gives
    the rest."""
    limit = device.memory * GIB * USABLE
    layouts, too_large = [], []
    degrees, impossible = _possible(spec, devices, device)
    for dims in degrees:
        tries = [
            _Try(spec, replace(dims, virtual=virtual), work, replace(training, recompute=text, recompute_vision=vision))
            for virtual in _interleavings(spec, dims)
            for text, vision in _RECOMPUTES
        ]
        tries.sort(key=lambda each: (each.cost, each.dims.virtual))
        fitting = next((each for each in tries if each.memory.total <= limit), None)
        if fitting:
            layouts.append(fitting.layout())
        else:
            too_large.append(min(tries, key=lambda each: each.memory.total).layout())
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


def _interleavings(spec: Qwen3VLSpec, dims: ParallelDims) -> list[int]:
    """Into how many chunks the layers of a pipeline rank can be cut: 1, and what the model allows besides."""

    def possible(virtual: int) -> bool:
        try:
            check_layout(spec, replace(dims, virtual=virtual))
        except ConfigError:
            return False
        return True

    return [1, *(n for n in _divisors(spec.text.layers // dims.pipeline) if n > 1 and possible(n))]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


class _Try:
    """A layout whose memory is not looked at before it is asked for."""

    def __init__(self, spec: Qwen3VLSpec, dims: ParallelDims, work: Work, training: Training) -> None:
        self.spec, self.dims, self.training, self.row = spec, dims, training, work.row(dims.data)
        self.microbatches = scheduled(math.ceil(work.prompts / (dims.data * self.row.prompts)), dims)
        self.factors = _costs(spec, dims, self.row, training, self.microbatches)
        self.factors["idle"] = self.microbatches * self.row.prompts * dims.data / work.prompts
        self.cost = math.prod(self.factors.values())

    @cached_property
    def memory(self) -> RankMemory:
        """Of the fullest rank."""
        return fullest_rank(self.spec, self.dims, self.row, self.training, self.microbatches)

    def layout(self) -> Layout:
        """With what its cost is made of, where it shows."""
        reasons = (f"{name} x{factor:.2f}" for name, factor in self.factors.items() if factor > 1.005)
        return Layout(
            dims=self.dims, training=self.training, memory=self.memory, cost=self.cost, reasons=tuple(reasons)
        )


def _costs(spec: Qwen3VLSpec, dims: ParallelDims, row: Row, training: Training, microbatches: int) -> dict[str, float]:
    """What makes a step dearer -> by which factor. A forward pass is a third of a step."""
    cost = _forward(spec, row)
    layers = cost.linear + cost.attention
    again = {"none": 0.0, "selective": cost.attention, "full": layers}[training.recompute]
    again += cost.vision if training.recompute_vision else 0.0
    stages = dims.pipeline * dims.virtual
    slowest = layers / dims.pipeline + max(cost.vision, cost.head)  # of a pipeline's ranks: the first or the last
    return {
        "recompute": 1 + again / cost.total / 3,
        "tensor": _DOUBLING ** math.log2(dims.tensor),
        "expert": _DOUBLING ** math.log2(dims.expert),
        "uneven": slowest * dims.pipeline / cost.total if dims.pipeline > 1 else 1.0,
        "borders": 1 + (_BORDER * stages / spec.text.layers if stages > 1 else 0),
        "bubble": 1 + (dims.pipeline - 1) / (dims.virtual * microbatches),
    }


@lru_cache(maxsize=1024)
def _forward(spec: Qwen3VLSpec, row: Row) -> ForwardCosts:
    """Of one of the row's groups."""
    frames = [(1, row.image * spec.vision.merge_size**2)]
    return forward_costs(row.prompt, [row.response] * row.responses, frames, unit_costs(spec))
