"""The numbers of `tests.tiny.make_tiny`'s model, for tests that need no folder; the token ids are made up."""

from __future__ import annotations

from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec, TextSpec, VisionSpec

SPEC = Qwen3VLSpec(
    text=TextSpec(
        vocab_size=384,
        hidden_size=64,
        ffn_size=96,
        layers=4,
        heads=4,
        kv_heads=2,
        head_dim=16,
        norm_eps=1e-6,
        rope_theta=1e4,
        mrope_section=(4, 2, 2),
        max_positions=2048,
    ),
    vision=VisionSpec(
        depth=3,
        hidden_size=32,
        ffn_size=48,
        heads=4,
        in_channels=3,
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        out_size=64,
        position_embeddings=64,
        deepstack_layers=(0, 2),
    ),
    tied_embeddings=True,
    image_token_id=1,
    video_token_id=2,
    vision_start_token_id=3,
    vision_end_token_id=4,
)
