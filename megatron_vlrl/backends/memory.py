"""What one rank holds while it trains, in bytes; pure functions of the model, the degrees and a row; torch-free.

Weights, gradients and optimizer are exact, but for the padding of the distributed optimizer's buffers. Not counted:
what the device's runtime, its communication buffers and the fragmentation of its memory take.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal

from megatron_vlrl.backends.activations import Recompute, Row, chunk_layers, head_workspace, stage_activations
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.models.qwen3_vl.names import TEXT, VISION, hf_shapes
from megatron_vlrl.models.qwen3_vl.sizes import parameter_counts
from megatron_vlrl.parallel.dims import ParallelDims

_GRADIENT = 4  # bytes of a summed gradient (grad_reduce_in_fp32)
_MOMENTS = 8  # of AdamW's two averages
_MASTER = 4  # of the float32 copy of a weight that is not float32 itself
_MOVING = 4  # of a moving reference's weight
_EXPERT = re.compile(r"\.mlp\.experts\.")
# What the tensor group cuts; everything else is whole on each of its ranks.
_CUT = re.compile(
    rf"^lm_head\.|^{re.escape(TEXT)}embed_tokens\.|\.self_attn\.[qkvo]_proj\.|\.mlp\.(gate|up|down)_proj\.|{_EXPERT.pattern}"
    rf"|^{re.escape(VISION)}blocks\.\d+\.(attn\.(qkv\.|proj\.weight)|mlp\.(linear_fc1\.|linear_fc2\.weight))"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What of a run's settings decides its memory. width: bytes of a weight. colocated: the rollout engine holds a
    whole copy of the weights on the same device, its key/value cache not counted. reference: the policy that a KL term
    measures from."""

    width: int = 2
    distributed: bool = True
    recompute: Recompute = "none"
    recompute_vision: bool = False
    colocated: bool = False
    reference: Literal["none", "frozen", "ema"] = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Bytes by use. text, vision: kept for the backward pass, and in text what pipeline stages hand each other. head:
    logits of a chunk and the head's gradient."""

    weights: float
    gradients: float
    optimizer: float
    text: float
    vision: float
    head: float
    rollout: float
    reference: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Name -> bytes, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def stage_parameters(spec: Qwen3VLSpec, dims: ParallelDims, stage: int) -> tuple[int, int]:
    """(numbers that all data ranks hold alike, numbers of the experts) on each rank of a pipeline stage."""
    chunks = [chunk_layers(spec.text.layers, dims, stage, chunk) for chunk in range(dims.virtual)]
    held = [str(layer) for layers in chunks for layer in layers]
    held += ["first"] if stage == 0 else []
    held += ["last"] if stage == dims.pipeline - 1 else []
    if spec.tied_embeddings and 0 < stage == dims.pipeline - 1:
        held.append("table")  # two stages hold it
    places = [_numbers(spec)[place] for place in held]
    shared = sum(place.whole + place.cut // dims.tensor for place in places)
    return shared, sum(place.experts for place in places) // dims.tensor // dims.expert


@dataclass(kw_only=True, slots=True)
class _Numbers:
    """whole: on each rank of a tensor group; cut: shared out over it; experts: over it and over their ranks."""

    whole: int = 0
    cut: int = 0
    experts: int = 0


@lru_cache(maxsize=16)
def _numbers(spec: Qwen3VLSpec) -> Mapping[str, _Numbers]:
    """By place: a decoder layer's number, the `first` stage's own parameters, the `last` one's; `table`, the
    embedding's, which is also among the first's."""
    places: defaultdict[str, _Numbers] = defaultdict(_Numbers)
    for name, shape in hf_shapes(spec).items():
        layer = re.match(rf"{re.escape(TEXT)}layers\.(\d+)\.", name)
        table = name.startswith(f"{TEXT}embed_tokens.")
        place = layer[1] if layer else "first" if table or name.startswith(VISION) else "last"
        kind = "experts" if _EXPERT.search(name) else "cut" if _CUT.search(name) else "whole"
        for where in (place, "table") if table else (place,):
            setattr(places[where], kind, getattr(places[where], kind) + math.prod(shape))
    return places


def rank_memory(
    spec: Qwen3VLSpec,
    dims: ParallelDims,
    row: Row,
    training: Training,
    stage: int,
    microbatches: int | None = None,
) -> RankMemory:
    """Of a rank of this pipeline stage, in a step of `microbatches` rows like `row`; None: as many as fill it."""
    shared, experts = stage_parameters(spec, dims, stage)
    numbers = shared + experts
    # The data ranks that hold the same numbers share their optimizer's state.
    owned = shared / dims.data + experts / (dims.data // dims.expert) if training.distributed else numbers
    state = _MOMENTS + (_MASTER if training.width < _MASTER else 0)
    activations = stage_activations(
        spec,
        row,
        dims,
        training.width,
        stage=stage,
        recompute=training.recompute,
        recompute_vision=training.recompute_vision,
        microbatches=microbatches,
    )
    return RankMemory(
        weights=numbers * training.width,
        gradients=numbers * _GRADIENT,
        optimizer=owned * state,
        text=activations["text"] + activations["borders"],
        vision=activations["vision"],
        head=head_workspace(spec, row, dims, training.width) if stage == dims.pipeline - 1 else 0.0,
        rollout=sum(parameter_counts(spec).values()) * training.width if training.colocated else 0.0,
        reference=numbers * _reference_width(training),
    )


def _reference_width(training: Training) -> int:
    if training.reference == "ema":
        # It is scored with in a copy of the weights' own dtype.
        return _MOVING + (training.width if training.width < _MOVING else 0)
    return training.width if training.reference == "frozen" else 0


def fullest_rank(
    spec: Qwen3VLSpec, dims: ParallelDims, row: Row, training: Training, microbatches: int | None = None
) -> RankMemory:
    """Of the pipeline stage that needs most."""
    stages = [rank_memory(spec, dims, row, training, stage, microbatches) for stage in range(dims.pipeline)]
    return max(stages, key=lambda memory: memory.total)
