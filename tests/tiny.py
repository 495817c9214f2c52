"""A tiny random Qwen3-VL as a Hugging Face folder, and samples with drawn images, for everyone's tests."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from examples.quickstart.make_model import make_processor, padded_vocab, random_model, token_ids
from megatron_vlrl.types import Message, Sample
from tools.train_tokenizer import to_fast_tokenizer, train_sentencepiece

if TYPE_CHECKING:
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLMoeConfig,
        Qwen3VLMoeForConditionalGeneration,
    )

TEXT = (
    "How many digits?",
    "Read the number.",
    "Give the box of the digit.",
    "Sum of the two digits?",
    "Which digit: 3, 7 or 1?",
    "<think>count</think><answer>3</answer>",
    "<think>3+4</think><answer>7</answer>",
    "user assistant system",
)


@functools.cache
def _tokenizer_model() -> bytes:
    return train_sentencepiece(TEXT * 4, 330)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """About 320 tokens: bytes, Qwen's special tokens, the tags and some merges."""
    return to_fast_tokenizer(_tokenizer_model())


def tiny_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    tied: bool,
    layers: int,
    vision_depth: int,
    deepstack: Sequence[int],
    moe: bool = False,
    heads: tuple[int, int] = (4, 2),
) -> Qwen3VLConfig | Qwen3VLMoeConfig:
    """Hidden 64, heads on key/value heads, an 8x8 table of vision positions. moe: each token goes to 2 of 4
    experts, but in layer 1, which is dense."""
    from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 16,
        "vocab_size": padded_vocab(tokenizer),
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": tied,
        "rope_parameters": rope,
    }
    vision = {
        "depth": vision_depth,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 64,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": list(deepstack),
    }
    if moe:
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1]}
    kind = Qwen3VLMoeConfig if moe else Qwen3VLConfig
    return kind(text_config=text, vision_config=vision, tie_word_embeddings=tied, **token_ids(tokenizer))


def _roughen(model: Qwen3VLForConditionalGeneration, seed: int) -> None:
    """Norms away from 1, biases away from 0, matrices large enough that every path moves the logits."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim >= 2:
                fan_in = weight.size(-1) if "experts" in name else weight[0].numel()
                weight.copy_(noise * (0.2 if "embed" in name else fan_in**-0.5))
            elif name.endswith("bias"):
                weight.copy_(0.1 * noise)
            else:
                weight.copy_(1.0 + 0.2 * noise)


def _moe_model(config: Qwen3VLMoeConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen3VLMoeForConditionalGeneration:
    """A float32 model; its weights are still to be drawn."""
    from transformers import Qwen3VLMoeForConditionalGeneration

    model = Qwen3VLMoeForConditionalGeneration(config).float().eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def make_tiny(
    folder: Path,
    *,
    tied: bool = True,
    layers: int = 4,
    vision_depth: int = 3,
    deepstack: Sequence[int] = (0, 2),
    seed: int = 0,
    moe: bool = False,
    heads: tuple[int, int] = (4, 2),
) -> Path:
    """Write config, float32 weights, tokenizer and processor of a tiny Qwen3-VL into `folder` and return it.

    384 embedding rows, of which the last have no token. Heads, key/value heads, vocabulary and widths divide by 2.
    moe: a Qwen3-VL-MoE. heads: of queries, and of keys and values.
    """
    tokenizer = tiny_tokenizer()
    config = tiny_config(
        tokenizer, tied=tied, layers=layers, vision_depth=vision_depth, deepstack=deepstack, moe=moe, heads=heads
    )
    return write_tiny(folder, config, tokenizer, seed=seed)


def write_tiny(
    folder: Path, config: Qwen3VLConfig | Qwen3VLMoeConfig, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0
) -> Path:
    """Write a model of `config` as `make_tiny` does."""
    moe = config.model_type == "qwen3_vl_moe"
    model = _moe_model(config, tokenizer) if moe else random_model(config, tokenizer, seed)
    _roughen(model, seed)
    make_processor(tokenizer).save_pretrained(folder)
    model.save_pretrained(folder)
    return Path(folder)


def png(size: tuple[int, int] = (96, 96), seed: int = 0) -> bytes:
    """A PNG of (width, height) pixels: coloured rectangles on grey, different for every seed."""
    from PIL import Image, ImageDraw

    random = np.random.default_rng(seed)
    image = Image.new("RGB", size, (120, 120, 120))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = random.integers(0, size[0]), random.integers(0, size[1])
        w, h = random.integers(4, 40, size=2)
        draw.rectangle((int(x), int(y), int(x + w), int(y + h)), fill=tuple(map(int, random.integers(0, 256, size=3))))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def sample(
    position: int = 0,
    images: int | Sequence[tuple[int, int]] = 1,
    size: tuple[int, int] = (96, 96),
    *,
    text: str = "How many digits?",
    task: str = "count",
    answer: Any = "3",
) -> Sample:
    """A sample with drawn PNGs, distinct for every position. `images`: how many of `size`, or each (width, height)."""
    sizes = [size] * images if isinstance(images, int) else list(images)
    return Sample(
        key=f"{task}-{position}",
        task=task,
        messages=(Message(role="user", content=text),),
        images=tuple(png(each, 1000 * position + index) for index, each in enumerate(sizes)),
        answer=answer,
        position=position,
        meta={"demonstration": f"<think>{task}</think><answer>{answer}</answer>"},
    )
