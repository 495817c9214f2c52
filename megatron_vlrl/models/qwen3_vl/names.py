"""Every Hugging Face parameter of a Qwen3-VL and its shape: what a complete weight set is; torch-free."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec, TextSpec, VisionSpec

TEXT = "model.language_model."
VISION = "model.visual."
EXPERTS_GATE_UP, EXPERTS_DOWN = EXPERTS = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
Shapes = dict[str, tuple[int, ...]]


def hf_shapes(spec: Qwen3VLSpec) -> Shapes:
    """Name -> shape. Tied embeddings have no `lm_head.weight`, as in the published folders."""
    shapes = {
        f"{TEXT}embed_tokens.weight": (spec.text.vocab_size, spec.text.hidden_size),
        f"{TEXT}norm.weight": (spec.text.hidden_size,),
    }
    if not spec.tied_embeddings:
        shapes["lm_head.weight"] = (spec.text.vocab_size, spec.text.hidden_size)
    for layer in range(spec.text.layers):
        mlp = _experts(spec.text) if spec.text.is_mixture(layer) else _mlp(spec.text)
        shapes |= {f"{TEXT}layers.{layer}.{name}": shape for name, shape in (_text_layer(spec.text) | mlp).items()}
    return shapes | {VISION + name: shape for name, shape in _vision(spec.vision).items()}


def _text_layer(text: TextSpec) -> Shapes:
    hidden, queries, keys = text.hidden_size, text.heads * text.head_dim, text.kv_heads * text.head_dim
    return {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (text.head_dim,),
        "self_attn.k_norm.weight": (text.head_dim,),
        "post_attention_layernorm.weight": (hidden,),
    }


def _mlp(text: TextSpec) -> Shapes:
    hidden = text.hidden_size
    return {
        "mlp.gate_proj.weight": (text.ffn_size, hidden),
        "mlp.up_proj.weight": (text.ffn_size, hidden),
        "mlp.down_proj.weight": (hidden, text.ffn_size),
    }


def _experts(text: TextSpec) -> Shapes:
    """Of all experts, as transformers 5 writes them: each expert's matrices are those of linear layers."""
    return {
        "mlp.gate.weight": (text.experts, text.hidden_size),
        EXPERTS_GATE_UP: (text.experts, 2 * text.expert_ffn_size, text.hidden_size),
        EXPERTS_DOWN: (text.experts, text.hidden_size, text.expert_ffn_size),
    }


def as_stored(shapes: Shapes, stored: Mapping[str, tuple[int, ...]]) -> Shapes:
    """`shapes`, with those experts transposed that are so in `stored`: the published folders hold [E, in, out]."""
    changed = {
        name: (experts, inner, out)
        for name, (experts, out, inner) in ((n, s) for n, s in shapes.items() if n.endswith(EXPERTS))
        if tuple(stored.get(name, ())) == (experts, inner, out)
    }
    return shapes | changed


def _vision(vision: VisionSpec) -> Shapes:
    width = vision.hidden_size
    patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    shapes: Shapes = {
        "patch_embed.proj.weight": (width, *patch),
        "patch_embed.proj.bias": (width,),
        "pos_embed.weight": (vision.position_embeddings, width),
    }
    for layer in range(vision.depth):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in _vision_layer(vision).items()}
    shapes |= {f"merger.{name}": shape for name, shape in _merger(vision, norm_after_merge=False).items()}
    for index in range(len(vision.deepstack_layers)):
        merger = _merger(vision, norm_after_merge=True)
        shapes |= {f"deepstack_merger_list.{index}.{name}": shape for name, shape in merger.items()}
    return shapes


def _vision_layer(vision: VisionSpec) -> Shapes:
    width = vision.hidden_size
    linears = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.linear_fc1": (vision.ffn_size, width),
        "mlp.linear_fc2": (width, vision.ffn_size),
    }
    return _with_biases(linears, norms={"norm1": width, "norm2": width})


def _merger(vision: VisionSpec, *, norm_after_merge: bool) -> Shapes:
    merged = vision.hidden_size * vision.merge_size**2
    linears = {"linear_fc1": (merged, merged), "linear_fc2": (vision.out_size, merged)}
    return _with_biases(linears, norms={"norm": merged if norm_after_merge else vision.hidden_size})


def _with_biases(linears: dict[str, tuple[int, int]], norms: dict[str, int]) -> Shapes:
    shapes: Shapes = {}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for name, (out, inner) in linears.items():
        shapes |= {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}
    return shapes
