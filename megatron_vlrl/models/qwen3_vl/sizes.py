"""The published sizes of Qwen3-VL by name, and parameters counted by module; torch-free.

The numbers are those of the published config.json files, written down so that a size can be planned for without its
folder; docs/plan.md says in which public copies each was found. tests/test_sizes.py holds them to these files' fields,
to transformers' own model of them, and to the totals of the published weight files. Training reads a folder's own
config.json, never these.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec, TextSpec, VisionSpec
from megatron_vlrl.models.qwen3_vl.names import TEXT, VISION, hf_shapes

_TEXT = TextSpec(
    vocab_size=151936,
    hidden_size=4096,
    ffn_size=12288,
    layers=36,
    heads=32,
    kv_heads=8,
    head_dim=128,
    norm_eps=1e-6,
    rope_theta=5e6,
    mrope_section=(24, 20, 20),
    max_positions=262144,
)
_MIXTURE = replace(_TEXT, kv_heads=4, experts=128, experts_per_token=8)
_LARGE_VISION = VisionSpec(
    depth=27,
    hidden_size=1152,
    ffn_size=4304,
    heads=16,
    in_channels=3,
    patch_size=16,
    temporal_patch_size=2,
    merge_size=2,
    out_size=4096,
    position_embeddings=2304,
    deepstack_layers=(8, 16, 24),
)
_SMALL_VISION = replace(_LARGE_VISION, depth=24, hidden_size=1024, ffn_size=4096, deepstack_layers=(5, 11, 17))


def _size(text: TextSpec, vision: VisionSpec, *, tied: bool) -> Qwen3VLSpec:
    return Qwen3VLSpec(
        text=text,
        vision=replace(vision, out_size=text.hidden_size),
        tied_embeddings=tied,
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )


SIZES: dict[str, Qwen3VLSpec] = {
    "qwen3-vl-2b": _size(
        replace(_TEXT, hidden_size=2048, ffn_size=6144, layers=28, heads=16), _SMALL_VISION, tied=True
    ),
    "qwen3-vl-4b": _size(replace(_TEXT, hidden_size=2560, ffn_size=9728), _SMALL_VISION, tied=True),
    "qwen3-vl-8b": _size(_TEXT, _LARGE_VISION, tied=False),
    "qwen3-vl-32b": _size(
        replace(_TEXT, hidden_size=5120, ffn_size=25600, layers=64, heads=64), _LARGE_VISION, tied=False
    ),
    "qwen3-vl-30b-a3b": _size(
        replace(_MIXTURE, hidden_size=2048, ffn_size=6144, layers=48, expert_ffn_size=768), _LARGE_VISION, tied=False
    ),
    "qwen3-vl-235b-a22b": _size(
        replace(_MIXTURE, layers=94, heads=64, expert_ffn_size=1536), _LARGE_VISION, tied=False
    ),
}

# The first that matches a Hugging Face name is its module.
_MODULES = {
    "embedding": re.escape(f"{TEXT}embed_tokens."),
    "layers": re.escape(f"{TEXT}layers."),
    "norm": re.escape(f"{TEXT}norm."),
    "head": r"lm_head\.",
    "mergers": re.escape(VISION) + r"(merger|deepstack_merger_list)\.",
    "vision": re.escape(VISION),
}


def module_of(name: str) -> str:
    """Which module a Hugging Face parameter belongs to: embedding, layers, norm, head, mergers or vision."""
    return next(module for module, pattern in _MODULES.items() if re.match(pattern, name))


def parameter_counts(spec: Qwen3VLSpec) -> dict[str, int]:
    """Numbers in each module; tied embeddings are counted once, and there is no head then."""
    counts = dict.fromkeys(_MODULES, 0)
    for name, shape in hf_shapes(spec).items():
        counts[module_of(name)] += math.prod(shape)
    return counts
