"""Groups -> packed rows -> microbatches: the border between lists and tensors."""

from megatron_vlrl.packing.attention import AttentionPlan, plan_attention
from megatron_vlrl.packing.balance import cut, packed_tokens
from megatron_vlrl.packing.filler import filler_group
from megatron_vlrl.packing.rows import Microbatch, Segment, Targets, pack

__all__ = [
    "AttentionPlan",
    "Microbatch",
    "Segment",
    "Targets",
    "cut",
    "filler_group",
    "pack",
    "packed_tokens",
    "plan_attention",
]
