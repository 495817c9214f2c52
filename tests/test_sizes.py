"""The named sizes are the published ones, field by field, and our stages of them add up, without any weight."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_vlrl.backends.activations import chunk_layers
from megatron_vlrl.backends.layout import check_layout
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.models.qwen3_vl.names import TEXT, hf_shapes
from megatron_vlrl.models.qwen3_vl.sizes import SIZES, module_of, parameter_counts
from megatron_vlrl.parallel.dims import ParallelDims
from tests.published import CONFIGS, PARAMETERS
from tests.spawn import run_ranks

if TYPE_CHECKING:
    from torch import nn

FEW_BYTES = 2**23  # rotary frequencies and the like, of all layers


class Allocated(TorchDispatchMode):
    """Bytes of the tensors made inside the block that are not on the meta device."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += sum(x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor) and not x.is_meta)
        return out


def test_every_size_is_known_here() -> None:
    assert set(SIZES) == set(CONFIGS) == set(PARAMETERS)


@pytest.mark.parametrize("name", SIZES)
def test_size_is_the_published_config(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    assert Qwen3VLSpec.load(tmp_path) == SIZES[name]


def hf_model(name: str) -> nn.Module:
    """transformers' model of the published config on the meta device."""
    import transformers

    config = dict(CONFIGS[name])
    kind = {"qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe"}[config.pop("model_type")]
    with torch.device("meta"), Allocated() as allocated:
        made = getattr(transformers, f"{kind}Config")(**config)
        model: nn.Module = getattr(transformers, f"{kind}ForConditionalGeneration")(made)
    assert allocated.total < FEW_BYTES
    return model


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_size_is_what_transformers_builds_of_it(name: str) -> None:
    spec, hf = SIZES[name], hf_model(name)
    assert {parameter: tuple(value.shape) for parameter, value in hf.named_parameters()} == hf_shapes(spec)
    text, vision = hf.model.language_model, hf.model.visual
    mergers = count(vision.merger, vision.deepstack_merger_list)
    assert parameter_counts(spec) == {
        "embedding": count(text.embed_tokens),
        "layers": count(text.layers),
        "norm": count(text.norm),
        "head": 0 if spec.tied_embeddings else count(hf.lm_head),
        "mergers": mergers,
        "vision": count(vision) - mergers,
    }


@pytest.mark.parametrize("name", SIZES)
def test_size_has_the_published_number_of_parameters(name: str) -> None:
    assert sum(parameter_counts(SIZES[name]).values()) == PARAMETERS[name]


def test_counts_are_by_module() -> None:
    counts = parameter_counts(SIZES["qwen3-vl-8b"])
    assert counts["embedding"] == counts["head"] == 151936 * 4096
    assert counts["norm"] == 4096
    assert counts["layers"] == 36 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128)
    assert parameter_counts(SIZES["qwen3-vl-2b"])["head"] == 0


def stage_counts(spec: Qwen3VLSpec, dims: ParallelDims) -> dict[str, Any]:
    """What this rank holds, from its chunks built on the meta device: numbers in all (`built`) and as planned, and by
    module as many as it stands for (`share`): a parameter that is cut counts as often as there are parts of it."""
    from megatron.core import parallel_state, tensor_parallel

    from megatron_vlrl.backends.megatron import cpu
    from megatron_vlrl.backends.megatron.configs import Precision, text_config, vision_config
    from megatron_vlrl.backends.megatron.groups import initialise
    from megatron_vlrl.backends.megatron.model import Qwen3VLStage
    from megatron_vlrl.backends.megatron.names import EMBEDDING, HEAD, rules
    from megatron_vlrl.backends.megatron.weights import parameters_by_global_name
    from megatron_vlrl.backends.memory import stage_parameters

    cpu.install()
    groups, process_groups = initialise(dims, 120.0)
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    precision = Precision(dtype=torch.bfloat16)
    text, vision = text_config(spec, dims, precision), vision_config(spec, dims, precision)
    with cpu.on_device(), torch.device("meta"), Allocated() as allocated:
        chunks = [Qwen3VLStage(spec, text, vision, process_groups, chunk=n) for n in range(dims.virtual)]
    hf_name = {rule.local: rule.hf[0] for rule in rules(spec)}
    hf_name.setdefault(HEAD, hf_name[EMBEDDING])
    share: Counter[str] = Counter()
    layers, built = set(), 0
    for local, parameter in parameters_by_global_name(chunks).items():
        assert parameter.is_meta, local
        parts = dims.tensor if getattr(parameter, "tensor_model_parallel", False) else 1
        parts *= 1 if getattr(parameter, "allreduce", True) else dims.expert
        share[module_of(hf_name[local])] += parameter.numel() * parts
        built += parameter.numel()
        layers |= set(map(int, re.findall(rf"^{re.escape(TEXT)}layers\.(\d+)\.", hf_name[local])))
    assert allocated.total < FEW_BYTES
    parallel_state.destroy_model_parallel()
    planned = sum(stage_parameters(spec, dims, groups.pipeline.rank))
    return {"share": dict(share), "built": built, "planned": planned, "layers": sorted(layers)}


def in_a_large_world(name: str, parallel: dict[str, Any]) -> list[dict[str, Any]]:
    """`stage_counts` of the first rank of each pipeline stage, and of the very last rank.

    One process plays them in turn, in a world whose other ranks do not exist: to build a stage is no communication.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    spec, dims = SIZES[name], ParallelDims(**parallel)
    check_layout(spec, dims)
    new_group = dist.new_group

    def new_fake_group(*args: Any, backend: Any, **kwargs: Any) -> Any:
        return new_group(*args, **kwargs)  # megatron-core asks for some groups of gloo by name

    results = []
    ranks = [stage * dims.tensor * dims.data for stage in range(dims.pipeline)]
    with mock.patch.object(dist, "new_group", new_fake_group):
        for rank in [*ranks, dims.world - 1]:
            dist.destroy_process_group()
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=dims.world)
            results.append(stage_counts(spec, dims))
    return results


LAYOUTS = [
    ("qwen3-vl-2b", {"tensor": 2, "pipeline": 7, "virtual": 2, "sequence": True}),
    ("qwen3-vl-2b", {"tensor": 4, "sequence": True}),
    ("qwen3-vl-4b", {"pipeline": 4, "data": 2}),
    ("qwen3-vl-4b", {"tensor": 8, "pipeline": 6, "virtual": 3, "data": 2, "sequence": True}),
    ("qwen3-vl-8b", {"tensor": 2, "pipeline": 2, "sequence": True}),
    ("qwen3-vl-8b", {"tensor": 4, "pipeline": 3, "virtual": 6, "data": 2, "sequence": True}),
    ("qwen3-vl-32b", {"pipeline": 2, "virtual": 2}),
    ("qwen3-vl-32b", {"tensor": 8, "pipeline": 8, "virtual": 4, "data": 4, "sequence": True}),
    ("qwen3-vl-30b-a3b", {"data": 32, "expert": 32}),
    ("qwen3-vl-30b-a3b", {"tensor": 2, "pipeline": 4, "virtual": 3, "data": 32, "expert": 16, "sequence": True}),
    ("qwen3-vl-235b-a22b", {"tensor": 4, "data": 64, "expert": 64, "sequence": True}),
    ("qwen3-vl-235b-a22b", {"tensor": 4, "pipeline": 2, "data": 16, "expert": 16, "sequence": True}),
    ("qwen3-vl-235b-a22b", {"tensor": 4, "pipeline": 2, "virtual": 47, "data": 64, "expert": 32, "sequence": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parallel"), LAYOUTS)
def test_stages_of_every_rank_hold_the_model_together(name: str, parallel: dict[str, Any]) -> None:
    spec, dims = SIZES[name], ParallelDims(**parallel)
    [results] = run_ranks(in_a_large_world, 1, name, parallel)
    *stages, last = results
    assert last == stages[-1]  # other ranks of a stage hold as much
    for number, stage in enumerate(stages):
        assert stage["built"] == stage["planned"]
        chunks = [chunk_layers(spec.text.layers, dims, number, chunk) for chunk in range(dims.virtual)]
        assert stage["layers"] == [layer for chunk in chunks for layer in chunk]
    together = sum((Counter(stage["share"]) for stage in stages), Counter())
    expected = Counter(parameter_counts(spec))
    if spec.tied_embeddings and dims.pipeline > 1:
        expected["embedding"] *= 2  # the last stage has a copy
    assert together == +expected
