"""What one rank holds while it trains, in bytes; pure functions of the model, the degrees and a row; torch-free.

Weights, gradients and optimizer are exact, but for the padding of the distributed optimizer's buffers. Not counted:
what the device's runtime, its communication buffers and the fragmentation of its memory take.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal

from megatron_vlrl.backends.activations import Recompute, Row, head_workspace, stage_activations, stage_of
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
    """Bytes by use. text, vision: kept for the backward pass. head: logits of a chunk and the head's gradient."""

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


@lru_cache(maxsize=1024)
def stage_parameters(spec: Qwen3VLSpec, dims: ParallelDims, stage: int) -> tuple[int, int]:
    """(numbers that all data ranks hold alike, numbers of the experts) on each rank of a pipeline stage."""
    shared = experts = 0
    for name, shape in hf_shapes(spec).items():
        if stage not in _stages(name, spec, dims):
            continue
        numbers = math.prod(shape) // (dims.tensor if _CUT.search(name) else 1)
        if _EXPERT.search(name):
            experts += numbers // dims.expert
        else:
            shared += numbers
    return shared, experts


def _stages(name: str, spec: Qwen3VLSpec, dims: ParallelDims) -> set[int]:
    """Which stages hold a parameter: two hold a tied table."""
    last = dims.pipeline - 1
    layer = re.match(rf"{re.escape(TEXT)}layers\.(\d+)\.", name)
    if layer:
        return {stage_of(int(layer[1]), spec.text.layers, dims)}
    if name.startswith(f"{TEXT}embed_tokens."):
        return {0, last} if spec.tied_embeddings else {0}
    return {0} if name.startswith(VISION) else {last}


def rank_memory(spec: Qwen3VLSpec, dims: ParallelDims, row: Row, training: Training, stage: int) -> RankMemory:
    """Of a rank of this pipeline stage; every row in flight is like `row`."""
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
    )
    return RankMemory(
        weights=numbers * training.width,
        gradients=numbers * _GRADIENT,
        optimizer=owned * state,
        text=activations["text"],
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


def fullest_rank(spec: Qwen3VLSpec, dims: ParallelDims, row: Row, training: Training) -> RankMemory:
    """Of the pipeline stage that needs most."""
    stages = [rank_memory(spec, dims, row, training, stage) for stage in range(dims.pipeline)]
    return max(stages, key=lambda memory: memory.total)
