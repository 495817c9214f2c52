"""A Qwen3-VL cut down in depth, with random bfloat16 weights in several files: to measure with, not to speak."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_vlrl.models.hf_files import INDEX_NAME
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.models.qwen3_vl.names import hf_shapes

CONFIG = {
    "model_type": "qwen3_vl",
    "tie_word_embeddings": False,
    "image_token_id": 50,
    "video_token_id": 51,
    "vision_start_token_id": 52,
    "vision_end_token_id": 53,
    "text_config": {
        "vocab_size": 40960,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_theta": 5e6,
        "rope_scaling": {"mrope_section": [24, 20, 20]},
    },
    "vision_config": {
        "depth": 4,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_heads": 12,
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 1024,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [1, 2],
    },
}
FILES = 3


def make_synthetic(folder: Path) -> Path:
    """Write about 600 MB into `folder`, whose largest tensor has 84 MB, and return it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = hf_shapes(Qwen3VLSpec.load(folder))
    generator = torch.Generator().manual_seed(0)
    placed = {}
    for number in range(FILES):
        names = sorted(shapes)[number::FILES]
        file = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        save_file(
            {name: torch.randn(shapes[name], generator=generator).bfloat16() for name in names},
            folder / file,
            metadata={"format": "pt"},
        )
        placed.update(dict.fromkeys(names, file))
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder
