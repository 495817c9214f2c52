"""What a Qwen3-VL is, read from its Hugging Face config.json; torch-free."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlrl.errors import ModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSpec:
    """The language model. Layers outside `dense_layers` (from 0) are mixtures of `experts`, where there are any."""

    vocab_size: int
    hidden_size: int
    ffn_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_positions: int
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    dense_layers: tuple[int, ...] = ()

    def is_mixture(self, layer: int) -> bool:
        """Whether this layer (from 0) routes its tokens to experts."""
        return self.experts > 0 and layer not in self.dense_layers


# model_type of config.json -> whether its language model is a mixture of experts
MODEL_TYPES = {"qwen3_vl": False, "qwen3_vl_moe": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionSpec:
    """The vision tower: patches of `patch_size`, merged `merge_size` x `merge_size` into one image token."""

    depth: int
    hidden_size: int
    ffn_size: int
    heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    out_size: int
    position_embeddings: int
    deepstack_layers: tuple[int, ...]
    rope_theta: float = 10000.0

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen3VLSpec:
    """The whole model."""

    text: TextSpec
    vision: VisionSpec
    tied_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    @property
    def vision_token_ids(self) -> tuple[int, ...]:
        """Ids that a response may never contain."""
        return (self.image_token_id, self.video_token_id, self.vision_start_token_id, self.vision_end_token_id)

    @classmethod
    def load(cls, folder: Path) -> Qwen3VLSpec:
        """Read `folder/config.json`; ModelError if it is missing or of another architecture."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ModelError(f"{path} does not exist; model.path must be a Hugging Face folder of a Qwen3-VL")
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.get("model_type") not in MODEL_TYPES:
            raise ModelError(
                f"{path} has model_type {raw.get('model_type')!r}; this version trains {' and '.join(MODEL_TYPES)}"
            )
        mixture = _mixture(raw["text_config"], path) if MODEL_TYPES[raw["model_type"]] else {}
        return cls(
            text=_text(raw["text_config"], mixture),
            vision=_vision(raw["vision_config"]),
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
            image_token_id=raw["image_token_id"],
            video_token_id=raw["video_token_id"],
            vision_start_token_id=raw["vision_start_token_id"],
            vision_end_token_id=raw["vision_end_token_id"],
        )


def _mixture(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of `TextSpec` about experts."""
    if not raw.get("norm_topk_prob", True):
        # Which transformers 5.19 does not read: it always normalises (modeling_qwen3_vl_moe.py, TopKRouter).
        raise ModelError(f"{path} has norm_topk_prob false; Qwen3-VL-MoE's chosen experts share a weight of 1")
    step = raw.get("decoder_sparse_step", 1)
    named = raw.get("mlp_only_layers") or []
    return {
        "experts": raw["num_local_experts"] if "num_local_experts" in raw else raw["num_experts"],
        "experts_per_token": raw["num_experts_per_tok"],
        "expert_ffn_size": raw["moe_intermediate_size"],
        "dense_layers": tuple(n for n in range(raw["num_hidden_layers"]) if n in named or (n + 1) % step),
    }


def _text(raw: dict[str, Any], mixture: dict[str, Any]) -> TextSpec:
    rope = raw.get("rope_parameters") or {**(raw.get("rope_scaling") or {}), "rope_theta": raw.get("rope_theta")}
    t, h, w = rope["mrope_section"]
    return TextSpec(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        ffn_size=raw["intermediate_size"],
        layers=raw["num_hidden_layers"],
        heads=raw["num_attention_heads"],
        kv_heads=raw["num_key_value_heads"],
        head_dim=raw["head_dim"],
        norm_eps=raw["rms_norm_eps"],
        rope_theta=float(rope["rope_theta"]),
        mrope_section=(t, h, w),
        max_positions=raw["max_position_embeddings"],
        **mixture,
    )


def _vision(raw: dict[str, Any]) -> VisionSpec:
    return VisionSpec(
        depth=raw["depth"],
        hidden_size=raw["hidden_size"],
        ffn_size=raw["intermediate_size"],
        heads=raw["num_heads"],
        in_channels=raw["in_channels"],
        patch_size=raw["patch_size"],
        temporal_patch_size=raw["temporal_patch_size"],
        merge_size=raw["spatial_merge_size"],
        out_size=raw["out_hidden_size"],
        position_embeddings=raw["num_position_embeddings"],
        deepstack_layers=tuple(raw["deepstack_visual_indexes"]),
        rope_theta=float((raw.get("rope_parameters") or {}).get("rope_theta", 10000.0)),
    )
