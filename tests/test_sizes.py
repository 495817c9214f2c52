"""The named sizes are transformers' models, number by number, and our stages of them add up, without any weight."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch

from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.models.qwen3_vl.names import hf_shapes
from megatron_vlrl.models.qwen3_vl.sizes import SIZES, module_of, parameter_counts
from megatron_vlrl.parallel.dims import ParallelDims
from tests.spawn import run_ranks

if TYPE_CHECKING:
    from torch import nn

# What the published weight files add up to, as far as is known here: written from memory.
PUBLISHED = {
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
    "qwen3-vl-32b": 33_357_390_064,
    "qwen3-vl-30b-a3b": 31_070_754_032,
    "qwen3-vl-235b-a22b": 235_670_022_896,
}


def hf_model(spec: Qwen3VLSpec) -> nn.Module:
    """transformers' model of these numbers on the meta device."""
    import transformers

    text: dict[str, Any] = {
        "vocab_size": spec.text.vocab_size,
        "hidden_size": spec.text.hidden_size,
        "intermediate_size": spec.text.ffn_size,
        "num_hidden_layers": spec.text.layers,
        "num_attention_heads": spec.text.heads,
        "num_key_value_heads": spec.text.kv_heads,
        "head_dim": spec.text.head_dim,
        "tie_word_embeddings": spec.tied_embeddings,
    }
    vision = {
        "depth": spec.vision.depth,
        "hidden_size": spec.vision.hidden_size,
        "intermediate_size": spec.vision.ffn_size,
        "num_heads": spec.vision.heads,
        "out_hidden_size": spec.vision.out_size,
        "num_position_embeddings": spec.vision.position_embeddings,
        "deepstack_visual_indexes": list(spec.vision.deepstack_layers),
    }
    kind = "Qwen3VL"
    if spec.text.experts:
        kind = "Qwen3VLMoe"
        text |= {
            "num_experts": spec.text.experts,
            "num_experts_per_tok": spec.text.experts_per_token,
            "moe_intermediate_size": spec.text.expert_ffn_size,
        }
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=vision, tie_word_embeddings=spec.tied_embeddings
    )
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    return model


@pytest.mark.parametrize("name", SIZES)
def test_size_is_what_transformers_builds_of_it(name: str) -> None:
    spec = SIZES[name]
    shapes = {parameter: tuple(value.shape) for parameter, value in hf_model(spec).named_parameters()}
    assert shapes == hf_shapes(spec)


@pytest.mark.parametrize("name", SIZES)
def test_size_has_the_published_number_of_parameters(name: str) -> None:
    assert sum(parameter_counts(SIZES[name]).values()) == PUBLISHED[name]


def test_every_size_is_known_here() -> None:
    assert set(SIZES) == set(PUBLISHED)


def test_counts_are_by_module() -> None:
    counts = parameter_counts(SIZES["qwen3-vl-8b"])
    assert counts["embedding"] == counts["head"] == 151936 * 4096
    assert counts["norm"] == 4096
    assert counts["layers"] == 36 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128)
    assert parameter_counts(SIZES["qwen3-vl-2b"])["head"] == 0


def stage_counts(name: str, parallel: dict[str, Any]) -> list[dict[str, int]]:
    """Numbers by module that this rank would hold, from stages built on the meta device; one entry a module."""
    from megatron.core import parallel_state, tensor_parallel

    from megatron_vlrl.backends.megatron import cpu
    from megatron_vlrl.backends.megatron.configs import Precision, text_config, vision_config
    from megatron_vlrl.backends.megatron.groups import initialise
    from megatron_vlrl.backends.megatron.model import Qwen3VLStage
    from megatron_vlrl.backends.megatron.names import EMBEDDING, HEAD, rules
    from megatron_vlrl.backends.megatron.weights import parameters_by_global_name
    from megatron_vlrl.backends.memory import stage_parameters

    spec, dims = SIZES[name], ParallelDims(**parallel)
    cpu.install()
    groups, process_groups = initialise(dims, 120.0)
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    precision = Precision(dtype=torch.bfloat16)
    text, vision = text_config(spec, dims, precision), vision_config(spec, dims, precision)
    with cpu.on_device(), torch.device("meta"):
        chunks = [Qwen3VLStage(spec, text, vision, process_groups, chunk=n) for n in range(dims.virtual)]
    hf_name = {rule.local: rule.hf[0] for rule in rules(spec)}
    hf_name.setdefault(HEAD, hf_name[EMBEDDING])
    held: Counter[str] = Counter()
    for local, parameter in parameters_by_global_name(chunks).items():
        assert parameter.is_meta, local
        held[module_of(hf_name[local])] += parameter.numel()
    parallel_state.destroy_model_parallel()
    predicted = sum(stage_parameters(spec, dims, groups.pipeline.rank))
    return [dict(held), {"built": sum(held.values()), "predicted": predicted}]


LAYOUTS = [
    ("qwen3-vl-8b", {"tensor": 2, "pipeline": 2, "sequence": True}),
    ("qwen3-vl-4b", {"pipeline": 4}),
    ("qwen3-vl-32b", {"pipeline": 2, "virtual": 2}),
    ("qwen3-vl-2b", {"tensor": 4, "sequence": True}),
    pytest.param("qwen3-vl-30b-a3b", {"data": 2, "expert": 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "parallel"), LAYOUTS)
def test_stages_of_every_rank_hold_the_model_together(name: str, parallel: dict[str, Any]) -> None:
    spec, dims = SIZES[name], ParallelDims(**parallel)
    results = run_ranks(stage_counts, dims.world, name, parallel)
    for _, totals in results:
        assert totals["built"] == totals["predicted"]
    together: Counter[str] = Counter()
    for held, _ in results:
        together.update(held)
    expected = parameter_counts(spec)
    copies = 2 if spec.tied_embeddings and dims.pipeline > 1 else 1
    assert together["embedding"] == copies * dims.data * expected["embedding"]
    assert together["head"] == dims.data * expected["head"]
    assert together["mergers"] == dims.tensor * dims.data * expected["mergers"]  # whole on each rank of a tensor group
    if spec.text.experts:
        experts = sum(math.prod(shape) for parameter, shape in hf_shapes(spec).items() if ".experts." in parameter)
        expected["layers"] += (dims.data // dims.expert - 1) * experts + (dims.data - 1) * (
            expected["layers"] - experts
        )
    assert expected["layers"] <= together["layers"] <= expected["layers"] * 1.001  # norms are on each rank
