"""Degrees that do not divide the model are one error that names every number."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vlrl.backends.layout import check_layout
from megatron_vlrl.errors import ConfigError
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.parallel.dims import ParallelDims
from tests.spec import SPEC


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


@pytest.mark.parametrize(
    ("dims", "named"),
    [
        (ParallelDims(pipeline=3), "parallel.pipeline=3 x virtual_pipeline=1 does not divide 4 layers"),
        (ParallelDims(pipeline=2, virtual=3), "parallel.pipeline=2 x virtual_pipeline=3 does not divide 4 layers"),
        (ParallelDims(pipeline=8), "parallel.pipeline=8 x virtual_pipeline=1 does not divide 4 layers"),
        (ParallelDims(virtual=2), "parallel.virtual_pipeline=2 interleaves pipeline stages, but there is one rank"),
        (ParallelDims(data=2, expert=2), "parallel.expert=2 shares experts, but the model has none"),
    ],
)
def test_stages_and_experts_that_cannot_be(dims: ParallelDims, named: str) -> None:
    assert message(SPEC, dims).startswith(named)
