"""Layers of the `local` provider, injected through megatron-core's ModuleSpec: SDPA attention and plain norms.

They run on CPU and CUDA alike, and allow sequence parallelism, which megatron-core's own torch norm does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_vlrl.packing.attention import AttentionPlan


@dataclass
class PackedRowParams(PackedSeqParams):
    """megatron-core's packed parameters with our plan; it carries them to every layer, stage and recompute.

    cu_seqlens are [0, T]: only the rotary embedding reads them, and one segment means that each token keeps
    the frequencies of its own position. Segment borders there would restart every response at position 0, silently.
    """

    plan: AttentionPlan | None = None
    logit_rows: Tensor | None = None


class RMSNorm(nn.Module):
    """Root-mean-square norm whose gradient is summed over the tensor group under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps, self.shape = eps, (hidden_size,)
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return F.rms_norm(hidden, self.shape, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """The vision tower's norm, made from megatron-core's arguments."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index]; index_select's backward is much faster than that of advanced indexing."""
    return rows.index_select(0, index.flatten()).view(*index.shape, *rows.shape[1:])


class _CoreAttention(MegatronModule):
    """Query, key and value [T, heads, H] -> [T, heads * H]."""

    def __init__(self, config: TransformerConfig, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        """[B, T, heads, H] each -> [B, T, heads, H]; grouped-query where heads differ."""
        grouped = query.size(2) != key.size(2)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            scale=self.scale,
            enable_gqa=grouped,
            **kwargs,
        )
        return out.transpose(1, 2)


class PackedRowAttention(_CoreAttention):
    """Attention of a packed row: prompts causal on themselves, responses on their prompt and themselves."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: PackedRowParams, **__: Any
    ) -> Tensor:
        """Two dense batches, whatever the number of groups, put back in packed order."""
        plan = packed_seq_params.plan
        assert plan is not None, "a packed row needs its attention plan"
        keys, values = _take(key, plan.prompt_index), _take(value, plan.prompt_index)
        out = self._attend(_take(query, plan.prompt_index), keys, values, is_causal=True).flatten(0, 1)
        if len(plan.owner):
            keys = torch.cat([_take(keys, plan.owner), _take(key, plan.response_index)], dim=1)
            values = torch.cat([_take(values, plan.owner), _take(value, plan.response_index)], dim=1)
            answers = self._attend(_take(query, plan.response_index), keys, values, attn_mask=plan.response_mask)
            out = torch.cat([out, answers.flatten(0, 1)])
        return _take(out, plan.unpack).flatten(1)


class ImageAttention(_CoreAttention):
    """Attention of the vision tower: each frame sees itself, without a mask; frames of one size go together."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: PackedSeqParams, **__: Any
    ) -> Tensor:
        """cu_seqlens_q holds the frames' borders."""
        borders = packed_seq_params.cu_seqlens_q.tolist()
        sizes = [end - begin for begin, end in pairwise(borders)]
        if len(set(sizes)) == 1:
            shape = (len(sizes), sizes[0], *query.shape[1:])
            return self._attend(query.view(shape), key.view(shape), value.view(shape)).flatten(0, 1).flatten(1)
        parts = zip(query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
        return torch.cat([self._attend(q[None], k[None], v[None])[0] for q, k, v in parts]).flatten(1)


class DeepStackLayer(TransformerLayer):
    """A decoder layer that adds the vision tower's features after the first few layers.

    They travel as TransformerBlock's `context`, [K, T, 1, D], zero at text; full recompute checkpoints it as an input.
    `first_feature` is the layer (from 0) that context[0] belongs to.
    """

    first_feature = 0

    def forward(
        self, hidden_states: Tensor, context: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Layer output plus this layer's features; `context` is handed on."""
        kwargs.pop("context_mask", None)
        hidden, _ = super().forward(hidden_states, context=None, **kwargs)
        index = self.layer_number - 1 - self.first_feature
        if context is not None and 0 <= index < context.size(0):
            hidden = hidden + context[index]
        return hidden, context


class Router(TopKRouter):
    """megatron-core's choice of experts, on logits of the hidden states' own type, as Hugging Face has them."""

    def gating(self, input: Tensor) -> Tensor:
        """[T, 1, D] -> logits [T, 1, E]. megatron-core's own needs Transformer Engine (moe_utils.py: te_general_gemm)
        even for this."""
        return F.linear(input, self.weight)

    def _apply_expert_bias(self, *_: Any, **__: Any) -> None:
        """No bias balances the experts; megatron-core would compile a function to find that out."""


_LINEARS = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
_MLP = ModuleSpec(module=MLP, submodules=_LINEARS)
_EXPERTS = ModuleSpec(
    module=MoELayer,
    submodules=MoESubmodules(experts=ModuleSpec(module=SequentialMLP, submodules=_LINEARS), router=Router),
)


def _layer(module: type, norm: type, core: type, mask: AttnMaskType, qk_norm: type, mlp: ModuleSpec) -> ModuleSpec:
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=core,
        linear_proj=RowParallelLinear,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    return ModuleSpec(
        module=module,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(module=SelfAttention, params={"attn_mask_type": mask}, submodules=attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def decoder_layer(*, mixture: bool = False) -> ModuleSpec:
    """One layer of the language model; its MLP is a mixture of experts where asked."""
    mlp = _EXPERTS if mixture else _MLP
    return _layer(DeepStackLayer, RMSNorm, PackedRowAttention, AttnMaskType.causal, RMSNorm, mlp)


def vision_layer() -> ModuleSpec:
    """One layer of the vision tower."""
    return _layer(TransformerLayer, LayerNorm, ImageAttention, AttnMaskType.no_mask, IdentityOp, _MLP)
