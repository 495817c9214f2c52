"""Degrees that do not divide the model are one error that names every number."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vlrl.backends.layout import check_layout
from megatron_vlrl.errors import ConfigError
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec, TextSpec, VisionSpec
from megatron_vlrl.parallel.dims import ParallelDims

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


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_divisible_layouts_pass(tensor: int, pipeline: int) -> None:
    check_layout(SPEC, ParallelDims(tensor=tensor, pipeline=pipeline))


def message(spec: Qwen3VLSpec, dims: ParallelDims) -> str:
    with pytest.raises(ConfigError) as caught:
        check_layout(spec, dims)
    return str(caught.value)


def test_everything_that_does_not_divide_is_named_at_once() -> None:
    text = message(SPEC, ParallelDims(tensor=5, pipeline=3, data=2))
    for part in (
        "parallel.tensor=5",
        "4 attention heads",
        "2 key/value heads",
        "96 feed-forward width",
        "384 vocabulary rows",
        "4 vision heads",
        "48 vision feed-forward width",
        "parallel.pipeline=3",
        "4 layers",
        "[1, 2, 4]",
        "tensor 5 x pipeline 3 x data 2 = 30",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("text", {"heads": 6}, "6 attention heads"),
        ("text", {"kv_heads": 2}, "2 key/value heads"),
        ("text", {"ffn_size": 98}, "98 feed-forward width"),
        ("text", {"vocab_size": 386}, "386 vocabulary rows"),
        ("vision", {"heads": 2}, "2 vision heads"),
        ("vision", {"ffn_size": 50}, "50 vision feed-forward width"),
    ],
)
def test_only_what_does_not_divide_is_named(part: str, change: dict[str, int], named: str) -> None:
    good = replace(SPEC, text=replace(SPEC.text, kv_heads=4))
    check_layout(good, ParallelDims(tensor=4))
    text = message(replace(good, **{part: replace(getattr(good, part), **change)}), ParallelDims(tensor=4))
    assert text.startswith(f"parallel.tensor=4 does not divide {named};")


def test_layers_alone() -> None:
    text = message(SPEC, ParallelDims(pipeline=3))
    assert text.startswith("parallel.pipeline=3 does not divide 4 layers")
