"""Groups -> packed rows -> microbatches: the border between lists and tensors."""

from megatron_vlrl.packing.attention import AttentionPlan, plan_attention
from megatron_vlrl.packing.balance import UnitCosts, cut, group_cost, packed_tokens
from megatron_vlrl.packing.filler import filler_group
from megatron_vlrl.packing.rows import Microbatch, Segment, Targets, pack

__all__ = [
    "AttentionPlan",
    "Microbatch",
    "Segment",
    "Targets",
    "UnitCosts",
    "cut",
    "filler_group",
    "group_cost",
    "pack",
    "packed_tokens",
    "plan_attention",
]
