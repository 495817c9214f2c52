"""Model spec and degrees -> megatron-core's own configuration objects."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec, TextSpec
from megatron_vlrl.parallel.dims import ParallelDims

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """The type of the weights and of the arithmetic."""

    dtype: torch.dtype = torch.float32


def _common(dims: ParallelDims, precision: Precision) -> dict[str, Any]:
    bf16 = precision.dtype == torch.bfloat16
    return {
        "tensor_model_parallel_size": dims.tensor,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": precision.dtype,
        "pipeline_dtype": precision.dtype,
        "bf16": bf16,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "perform_initialization": True,
        # Fused kernels are CUDA's; the local provider computes the same without them.
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "batch_p2p_comm": False,  # messages go through pipeline.VaryingShapeP2P
        "batch_p2p_sync": False,
        "cuda_graph_scope": [],  # the default is deprecated and says so
    }


def text_config(
    spec: Qwen3VLSpec, dims: ParallelDims, precision: Precision, recompute: Recompute = "none"
) -> TransformerConfig:
    """The language model's."""
    text = spec.text
    extra: dict[str, Any] = {}
    if recompute == "full":
        extra.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif recompute == "selective":
        extra.update(recompute_granularity="selective", recompute_modules=["core_attn"])
    if text.experts:
        extra.update(_mixture(text, dims))
    if dims.virtual > 1:
        extra.update(virtual_pipeline_model_parallel_size=dims.virtual)
    if dims.pipeline > 1:
        # Packed rows differ in length. The dispatcher is named only because validation asks for it with this flag,
        # even for a dense model (megatron-core 0.16.1, transformer_config.py).
        extra.update(variable_seq_lengths=True, moe_token_dispatcher_type="alltoall")
    return TransformerConfig(
        num_layers=text.layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.heads,
        num_query_groups=text.kv_heads,
        kv_channels=text.head_dim,
        ffn_hidden_size=text.ffn_size,
        layernorm_epsilon=text.norm_eps,
        normalization="RMSNorm",
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        mrope_section=list(text.mrope_section),
        pipeline_model_parallel_size=dims.pipeline,
        sequence_parallel=dims.sequence and dims.tensor > 1,
        # The loss carries its global denominators: gradients are summed over microbatches and ranks, never averaged.
        calculate_per_token_loss=True,
        **_common(dims, precision),
        **extra,
    )


def _mixture(text: TextSpec, dims: ParallelDims) -> dict[str, Any]:
    """Experts as in Hugging Face's: the softmax of the chosen logits is the normalised softmax of all. No token is
    dropped, and nothing but the loss teaches the router."""
    kinds = [int(text.is_mixture(layer)) for layer in range(text.layers)]
    return {
        # As a list, layers have names of their own in a checkpoint; stacked under one name, all must be alike.
        "moe_layer_freq": 1 if len(set(kinds)) == 1 else kinds,
        "num_moe_experts": text.experts,
        "moe_ffn_hidden_size": text.expert_ffn_size,
        "moe_router_topk": text.experts_per_token,
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": dims.expert,
        "expert_tensor_parallel_size": dims.tensor,
    }


def vision_config(
    spec: Qwen3VLSpec, dims: ParallelDims, precision: Precision, *, recompute: bool = False
) -> TransformerConfig:
    """The vision tower's: tensor parallel, never sequence or pipeline parallel."""
    vision = spec.vision
    return TransformerConfig(
        num_layers=vision.depth,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.heads,
        num_query_groups=vision.heads,
        kv_channels=vision.hidden_size // vision.heads,
        ffn_hidden_size=vision.ffn_size,
        layernorm_epsilon=1e-6,
        normalization="LayerNorm",
        gated_linear_unit=False,
        activation_func=functools.partial(F.gelu, approximate="tanh"),
        add_bias_linear=True,
        add_qkv_bias=True,
        qk_layernorm=False,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        **_common(dims, precision),
    )
