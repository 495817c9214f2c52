"""A checkpoint of the megatron backend: every local shard of weights and moments comes back at every other layout.

Shards are compared with what the saving ranks held, cut anew by the name table; never with a second save.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron_vlrl.backends import Backend, build_backend
from megatron_vlrl.backends.megatron import optimizer as optimizer_module
from megatron_vlrl.backends.megatron.backend import MegatronBackend
from megatron_vlrl.backends.megatron.names import EMBEDDING, HEAD, rules
from megatron_vlrl.backends.megatron.optimizer import parts_of
from megatron_vlrl.backends.protocol import OptimizerStep, TokenReport
from megatron_vlrl.config.schema import OptimizerConfig
from megatron_vlrl.errors import CheckpointError
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.models.qwen3_vl.names import hf_shapes
from megatron_vlrl.packing import Microbatch, pack
from tests.reference import backend_options, make_groups, renderer_and_sampling
from tests.spawn import run_ranks
from tests.tiny import make_tiny

OPTIMIZER = OptimizerConfig(
    weight_decay=0.1, lr_scale={"model.visual.*": 0.25, "model.visual.merger.*": 3.0, "*.embed_tokens.*": 2.0}
)
BUCKET_SIZE = 20_000  # about ten buckets where communication overlaps
KINDS = ("", " exp_avg", " exp_avg_sq")
Layout = Mapping[str, Any]
# (first element held, values) of a flattened local shard, by name and kind
Slices = dict[str, tuple[int, Tensor]]
Saved = tuple[Path, list[dict[str, Any]]]


def make(folder: Path, layout: Layout) -> MegatronBackend:
    """`layout`: ParallelConfig's settings, and `distributed`."""
    optimizer_module.BUCKET_SIZE = BUCKET_SIZE
    _, sampling = renderer_and_sampling(folder)
    parallel = {key: value for key, value in layout.items() if key != "distributed"}
    optimizer = replace(OPTIMIZER, distributed=layout.get("distributed", False))
    backend = build_backend(replace(backend_options(folder, sampling, **parallel), optimizer=optimizer))
    assert isinstance(backend, MegatronBackend)
    return backend


def surprise(batch: Microbatch, log_probs: Tensor, entropies: Tensor) -> tuple[Tensor, TokenReport]:
    return -log_probs.sum() / 100, TokenReport(sums={}, maxima={})


def step(folder: Path, backend: Backend) -> float:
    renderer, _ = renderer_and_sampling(folder)
    data = backend.groups.data
    row = pack(make_groups(renderer)[data.rank :: data.size], multiple=backend.groups.tensor.size)
    return float(backend.train_step([row], surprise, OptimizerStep.of(OPTIMIZER, lr=1e-3)).sums["loss"])


def shards(backend: MegatronBackend) -> Iterator[tuple[str, nn.Parameter, int, Any, dict[str, Any], dict[str, Tensor]]]:
    """(name, parameter, first element, optimizer's part of it, its group, its state) of all that this rank updates."""
    names = {parameter: name for name, parameter in backend.weights.parameters.items()}
    for part in parts_of(backend.optimizer):
        if hasattr(part, "gbuf_ranges"):
            for parameter, (group, place) in part.model_param_group_index_map.items():
                mine = part.optimizer.param_groups[group]["params"][place]
                start = part._get_model_param_range_map(parameter)["param"].start
                yield names[parameter], parameter, start, mine, part.optimizer.param_groups[group], part.optimizer.state
        else:
            for group in part.param_groups:
                for parameter in group["params"]:
                    yield names[parameter], parameter, 0, parameter, group, part.optimizer.state


def held(backend: MegatronBackend) -> tuple[Slices, dict[str, tuple[float, float, int]]]:
    """Copies of what this rank holds, and (rate factor, weight decay, steps) of each parameter that it updates."""
    slices: Slices = {name: (0, p.detach().flatten().clone()) for name, p in backend.weights.parameters.items()}
    settings = {}
    for name, parameter, start, mine, group, state in shards(backend):
        flat = parameter.detach().flatten()
        assert torch.equal(mine.detach().flatten(), flat[start : start + mine.numel()])  # what is updated is in use
        for kind in KINDS[1:]:
            slices[name + kind] = (start, state[mine][kind.strip()].flatten().clone())
        settings[name] = (group["lr_mult"], group["weight_decay"], group["step"])
    return slices, settings


def draws() -> list[float]:
    """The next number of every generator; moves them."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        forked = float(torch.rand(1))
    return [random.random(), float(np.random.random()), float(torch.rand(1)), forked]


def observed(folder: Path, backend: MegatronBackend) -> dict[str, Any]:
    """What this rank holds now, its place, and what comes next; the backend stays open."""
    backend._complete_weights()
    slices, settings = held(backend)
    tensor = backend.groups.tensor
    result = {"place": (tensor.rank, tensor.size), "slices": slices, "settings": settings, "draws": draws()}
    result["buckets"] = sum(len(buffer.buckets) for chunk in backend.wrapped for buffer in chunk.buffers)
    result["loss"] = [step(folder, backend) for _ in range(2)]
    return result


def train_and_save(folder: Path, target: Path, layout: Layout) -> dict[str, Any]:
    """Two steps, then a checkpoint."""
    backend = make(folder, layout)
    for _ in range(2):
        step(folder, backend)
    rank = backend.groups.world.rank
    random.seed(100 + rank)
    np.random.seed(200 + rank)
    torch.manual_seed(300 + rank)
    backend.save(target)
    result = observed(folder, backend)
    backend.close()
    return result


def load(folder: Path, target: Path, layout: Layout) -> dict[str, Any]:
    """The same from a fresh backend at another layout."""
    backend = make(folder, layout)
    backend.load(target)
    result = observed(folder, backend)
    backend.close()
    return result


def whole_tensors(folder: Path, ranks: list[dict[str, Any]]) -> dict[str, list[Tensor]]:
    """Every parameter and moment as its Hugging Face tensors, put together from the saving ranks' slices."""
    spec = Qwen3VLSpec.load(folder)
    shapes, size, dense = hf_shapes(spec), ranks[0]["place"][1], {}
    for rule in rules(spec):
        whole = [torch.empty(shapes[name]) for name in rule.hf]
        for kind in KINDS:
            parts = []
            for number in range(size):
                part = torch.full_like(rule.layout.shard(whole, number, size), torch.nan)
                for rank in ranks:
                    if rank["place"][0] == number and rule.local + kind in rank["slices"]:
                        start, values = rank["slices"][rule.local + kind]
                        part.view(-1)[start : start + len(values)] = values
                assert not part.isnan().any(), rule.local + kind
                parts.append(part)
            dense[rule.local + kind] = rule.layout.join(parts, [shapes[name] for name in rule.hf])
    return dense


WORLD = ("tensor", "pipeline", "data")
CASES: dict[str, tuple[Layout, dict[str, Layout]]] = {
    "plain at tp2": (
        {"tensor": 2},
        {"tp2": {"tensor": 2}, "one": {}, "pp2": {"pipeline": 2}, "vpp2": {"pipeline": 2, "virtual_pipeline": 2}},
    ),
    "plain at vpp2": (
        {"pipeline": 2, "virtual_pipeline": 2},
        {"vpp2": {"pipeline": 2, "virtual_pipeline": 2}, "pp2": {"pipeline": 2}, "one": {}},
    ),
    "distributed at dp2": (
        {"data": 2, "distributed": True, "overlap": True},
        {
            "dp2": {"data": 2, "distributed": True, "overlap": True},
            "dp2 in one bucket": {"data": 2, "distributed": True},
            "dp1": {"distributed": True, "overlap": True},
            "tp2": {"tensor": 2, "distributed": True, "overlap": True},
            "vpp2": {"pipeline": 2, "virtual_pipeline": 2, "distributed": True, "overlap": True},
        },
    ),
    "distributed at pp2": (
        {"pipeline": 2, "distributed": True, "overlap": True},
        {"pp2": {"pipeline": 2, "distributed": True, "overlap": True}, "dp2": {"data": 2, "distributed": True}},
    ),
}


def world_of(layout: Layout) -> int:
    return int(np.prod([layout.get(axis, 1) for axis in WORLD]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """Case -> (checkpoint, what each of the saving ranks held); each made once."""

    @functools.cache
    def get(case: str) -> Saved:
        target, layout = tmp_path_factory.mktemp("checkpoint"), CASES[case][0]
        return target, run_ranks(train_and_save, world_of(layout), folder, target, layout)

    return get


FAST = {("plain at tp2", "tp2"), ("plain at tp2", "vpp2"), ("distributed at dp2", "dp2"), ("distributed at dp2", "dp1")}


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, marks=() if (case, name) in FAST else pytest.mark.slow)
        for case, (_, others) in CASES.items()
        for name in others
    ],
)
def test_every_shard_comes_back(case: str, name: str, folder: Path, saved: Callable[[str], Saved]) -> None:
    target, ranks = saved(case)
    origin, layout = CASES[case][0], CASES[case][1][name]
    dense = whole_tensors(folder, ranks)
    settings = {key: value for rank in ranks for key, value in rank["settings"].items()}
    assert {value[0] for value in settings.values()} == {1.0, 0.25, 3.0, 2.0}
    assert {value[2] for value in settings.values()} == {2}
    if origin.get("overlap") and "data" in origin:
        assert ranks[0]["buckets"] > 5
    layouts = {rule.local: rule.layout for rule in rules(Qwen3VLSpec.load(folder))}
    seen: set[str] = set()
    loaded = run_ranks(load, world_of(layout), folder, target, layout)
    for number, rank in enumerate(loaded):
        for key, (start, values) in rank["slices"].items():
            source = key.replace(HEAD, EMBEDDING)  # the last stage's copy of the tied table
            expected = layouts[source.split(" ")[0]].shard(dense[source], *rank["place"]).flatten()
            assert torch.equal(values, expected[start : start + len(values)]), key
            seen.add(source)
        for key, value in rank["settings"].items():
            assert value == settings[EMBEDDING if key == HEAD else key]
        assert rank["loss"] == pytest.approx(ranks[0]["loss"], rel=1e-5)
        if layout == origin:
            assert rank["draws"] == ranks[number]["draws"]
            assert rank["loss"] == ranks[number]["loss"]
    assert seen == set(dense)


def load_as_another_kind(folder: Path, target: Path) -> str:
    backend = make(folder, {"data": 2})
    before = {name: parameter.clone() for name, parameter in backend.weights.parameters.items()}
    with pytest.raises(CheckpointError) as caught:
        backend.load(target)
    assert all(torch.equal(parameter, before[name]) for name, parameter in backend.weights.parameters.items())
    backend.close()
    return str(caught.value)


def test_the_other_kind_of_optimizer_is_refused(folder: Path, saved: Callable[[str], Saved]) -> None:
    for message in run_ranks(load_as_another_kind, 2, folder, saved("distributed at dp2")[0]):
        assert "saved with optimizer.distributed=True" in message
        assert "set it so" in message


def save_before_the_first_update(folder: Path, target: Path) -> list[float]:
    layout = {"distributed": True}
    backend = make(folder, layout)
    backend.save(target)
    losses = [step(folder, backend) for _ in range(2)]
    backend.close()
    backend = make(folder, layout)
    backend.load(target)
    losses += [step(folder, backend) for _ in range(2)]
    backend.close()
    return losses


@pytest.mark.slow
def test_a_run_without_an_update_can_be_resumed(folder: Path, tmp_path: Path) -> None:
    (losses,) = run_ranks(save_before_the_first_update, 1, folder, tmp_path)
    assert losses[:2] == losses[2:]
