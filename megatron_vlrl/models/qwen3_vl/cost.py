"""What a Qwen3-VL computes for each token, image patch and pair of them that look at each other, and so for a group:
pure functions; torch-free. Balancing and planning both count with these.

Matrix products alone, two FLOPs for a multiplication and its addition; norms, activations and rotations are left out.

D hidden size, H heads x head size, F feed-forward width, L layers; W width of the vision tower, M patches of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec, TextSpec, VisionSpec
from megatron_vlrl.types import RolloutGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitCosts:
    """FLOPs of a forward pass, by what they are proportional to. A backward pass costs twice as much of each.

    token: a packed token in the linear layers. pair: a query that looks at a key, all layers. logit: a row of logits.
    patch: a vision patch in the linear layers. patch_pair: two patches of one frame that look at each other.
    """

    token: float
    pair: float
    logit: float
    patch: float
    patch_pair: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardCosts:
    """FLOPs of a forward pass by part. linear: the decoder layers' matrices; attention: what is inside attention."""

    linear: float
    attention: float
    head: float
    vision: float

    @property
    def total(self) -> float:
        """All parts."""
        return self.linear + self.attention + self.head + self.vision


def forward_costs(
    prompt: int, responses: Sequence[int], frames: Sequence[tuple[int, int]], unit: UnitCosts
) -> ForwardCosts:
    """Of a forward pass over a group: its prompt and images once, each response on [prompt; itself].

    prompt, responses: tokens. frames: (how many, patches of each) by image or video.
    """
    pairs = prompt * prompt / 2 + sum(length * (prompt + length / 2) for length in responses)
    return ForwardCosts(
        linear=unit.token * (prompt + sum(responses)),
        attention=unit.pair * pairs,
        head=unit.logit * (1 + sum(length - 1 for length in responses)),  # first tokens share a row, last need none
        vision=unit.patch * sum(count * patches for count, patches in frames)
        + unit.patch_pair * sum(count * patches**2 for count, patches in frames),
    )


def group_cost(group: RolloutGroup, unit: UnitCosts) -> float:
    """FLOPs of a forward pass over a group."""
    responses = [len(rollout.token_ids) for rollout in group.rollouts]
    frames = [(t, h * w) for t, h, w in group.prompt.grids]
    return forward_costs(len(group.prompt.token_ids), responses, frames, unit).total


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
