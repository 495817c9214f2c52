"""The config.json of each published Qwen3-VL, and what its weight files add up to, in Hugging Face's words.

Copied from public copies of these files, not from `models/qwen3_vl/sizes.py`, which tests compare with them. Left out
is what shapes nothing: initialisation, dtype, versions. docs/plan.md says which kind of source each came from.
"""

from __future__ import annotations

from typing import Any

TEXT: dict[str, Any] = {
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    "rope_theta": 5000000,
    "vocab_size": 151936,
}
MIXTURE: dict[str, Any] = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
}
VISION: dict[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "in_channels": 3,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
TOWER_24 = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
TOWER_27 = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}


def _text(layers: int, hidden: int, ffn: int, heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
    }


def _config(text: dict[str, Any], tower: dict[str, Any], out: int, *, tied: bool) -> dict[str, Any]:
    kind = "qwen3_vl_moe" if "num_experts" in text else "qwen3_vl"
    return {
        "model_type": kind,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": tied,
        "text_config": {**TEXT, **text, "model_type": f"{kind}_text"},
        "vision_config": {**VISION, **tower, "out_hidden_size": out, "model_type": kind},
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-vl-2b": _config(_text(28, 2048, 6144, 16), TOWER_24, 2048, tied=True),
    "qwen3-vl-4b": _config(_text(36, 2560, 9728, 32), TOWER_24, 2560, tied=True),
    "qwen3-vl-8b": _config(_text(36, 4096, 12288, 32), TOWER_27, 4096, tied=False),
    "qwen3-vl-32b": _config(_text(64, 5120, 25600, 64), TOWER_27, 5120, tied=False),
    "qwen3-vl-30b-a3b": _config(
        {**MIXTURE, **_text(48, 2048, 6144, 32), "moe_intermediate_size": 768}, TOWER_27, 2048, tied=False
    ),
    "qwen3-vl-235b-a22b": _config(
        {**MIXTURE, **_text(94, 4096, 12288, 64), "moe_intermediate_size": 1536}, TOWER_27, 4096, tied=False
    ),
}

# Numbers in the published weight files: half of their index's total_size, in bfloat16, or the hub's own count.
PARAMETERS = {
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
    "qwen3-vl-32b": 33_357_390_064,
    "qwen3-vl-30b-a3b": 31_070_754_032,
    "qwen3-vl-235b-a22b": 235_670_022_896,
}
