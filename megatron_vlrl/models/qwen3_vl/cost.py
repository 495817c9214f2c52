"""What a Qwen3-VL computes for each token, image patch and pair of them that look at each other: pure functions.

Matrix products alone, two FLOPs for a multiplication and its addition; norms, activations and rotations are left out.

D hidden size, H heads x head size, F feed-forward width, L layers; W width of the vision tower, M patches of a token.
"""

from __future__ import annotations

from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec, TextSpec, VisionSpec
from megatron_vlrl.packing.balance import UnitCosts


def unit_costs(spec: Qwen3VLSpec) -> UnitCosts:
    """Of the whole model, all ranks of a replica together."""
    text, vision = spec.text, spec.vision
    return UnitCosts(
        token=2.0 * sum(_layer(text, layer) for layer in range(text.layers)),
        pair=4.0 * text.layers * text.heads * text.head_dim,  # the score, and the weighted value
        logit=2.0 * text.vocab_size * text.hidden_size,
        patch=2.0 * _patch(vision),
        patch_pair=4.0 * vision.depth * vision.hidden_size,
    )


def _layer(text: TextSpec, layer: int) -> int:
    """Weights that a token meets in a layer; of a mixture, those of its own experts and the router."""
    hidden = text.hidden_size
    attention = hidden * text.head_dim * (2 * text.heads + 2 * text.kv_heads)
    if text.is_mixture(layer):
        return attention + hidden * (3 * text.experts_per_token * text.expert_ffn_size + text.experts)
    return attention + 3 * hidden * text.ffn_size


def _patch(vision: VisionSpec) -> int:
    """Weights that a patch meets; in the mergers (one at the end, one for each DeepStack layer) a share of a token."""
    width, merged = vision.hidden_size, vision.merge_size**2
    block = 4 * width**2 + 2 * width * vision.ffn_size
    merger = merged * width**2 + width * vision.out_size
    return vision.patch_dim * width + vision.depth * block + (1 + len(vision.deepstack_layers)) * merger
