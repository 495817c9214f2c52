"""Makes the quickstart's small Qwen3-VL: a Hugging Face folder with random weights, tokenizer and processor.

In: the training JSONL, whose prompts and demonstrations are the tokenizer's text. Out: a folder that transformers
loads with AutoModelForImageTextToText and AutoProcessor. The architecture is Qwen3-VL's own, with 1.32 M parameters:
vision tower, merger, DeepStack, interleaved MRoPE, grouped queries and qk-norm are all there, only small.

    python examples/quickstart/make_model.py --data TRAIN.jsonl --out DIR --seed 0
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.train_tokenizer import CHAT_TEMPLATE, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

VOCAB_SIZE = 352
VOCAB_MULTIPLE = 64  # rows of the embedding; divisible by any tensor-parallel size in use
MIN_PIXELS, MAX_PIXELS = 32 * 32, 128 * 128  # an image of 96x96 is left as it is


def tokenizer_text(data: Path) -> Iterator[str]:
    """The prompts and demonstrations of a training JSONL, and the names of the roles."""
    with data.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            prompt = record["prompt"]
            yield from [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
            yield from ("user", "assistant", "system")
            if "demonstration" in record.get("meta", {}):
                yield record["meta"]["demonstration"]


def make_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLProcessor:
    """Qwen3-VL's processor around the tokenizer: patches of 16, merged 2x2 into an image token."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    common = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(size), **common),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=dict(size), **common),
        chat_template=CHAT_TEMPLATE,
    )


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The vision tokens' ids under their names in config.json."""
    names = {
        "image": "<|image_pad|>",
        "video": "<|video_pad|>",
        "vision_start": "<|vision_start|>",
        "vision_end": "<|vision_end|>",
    }
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def padded_vocab(tokenizer: PreTrainedTokenizerFast) -> int:
    """Embedding rows: the vocabulary rounded up to a multiple of 64."""
    return -(-len(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def quickstart_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    """The architecture: 1.32 million parameters with 384 embedding rows."""
    from transformers import Qwen3VLConfig

    text = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": padded_vocab(tokenizer),
        "max_position_embeddings": 4096,
        "initializer_range": 0.04,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_heads": 4,
        "out_hidden_size": 128,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
        "initializer_range": 0.04,
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **token_ids(tokenizer))


def random_model(
    config: Qwen3VLConfig, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Qwen3VLForConditionalGeneration:
    """A float32 model with weights drawn from `seed`; the caller's random state is left alone."""
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config).float().eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def make_model(data: Path, out: Path, seed: int) -> int:
    """Write the folder; returns the number of parameters."""
    tokenizer = train_tokenizer(tokenizer_text(data), VOCAB_SIZE)
    model = random_model(quickstart_config(tokenizer), tokenizer, seed)
    make_processor(tokenizer).save_pretrained(out)
    model.save_pretrained(out)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the quickstart's small Qwen3-VL.")
    parser.add_argument("--data", type=Path, required=True, help="training JSONL")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from transformers.utils import logging

    logging.disable_progress_bar()
    count = make_model(args.data, args.out, args.seed)
    print(f"Qwen3-VL with {count / 1e6:.2f} M parameters written to {args.out}")


if __name__ == "__main__":
    main()
