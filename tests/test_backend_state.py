"""A checkpoint of the megatron backend, saved at TP2: every local shard of weights and moments at other layouts.

Shards are compared with what the saving ranks held, cut anew by the name table; never with a second save.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_vlrl.backends import Backend, build_backend
from megatron_vlrl.backends.megatron.backend import MegatronBackend
from megatron_vlrl.backends.megatron.names import EMBEDDING, HEAD, rules
from megatron_vlrl.backends.protocol import TokenReport
from megatron_vlrl.config.schema import OptimizerConfig
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.models.qwen3_vl.names import hf_shapes
from megatron_vlrl.packing import Microbatch, pack
from tests.reference import backend_options, local_state, make_groups, renderer_and_sampling
from tests.spawn import run_ranks
from tests.tiny import make_tiny

OPTIMIZER = OptimizerConfig(
    weight_decay=0.1, lr_scale={"model.visual.*": 0.25, "model.visual.merger.*": 3.0, "*.embed_tokens.*": 2.0}
)


def make(folder: Path, parallel: Mapping[str, int]) -> MegatronBackend:
    _, sampling = renderer_and_sampling(folder)
    options = replace(backend_options(folder, sampling, **parallel), optimizer=OPTIMIZER)
    backend = build_backend(options)
    assert isinstance(backend, MegatronBackend)
    return backend


def surprise(batch: Microbatch, log_probs: Tensor, entropies: Tensor) -> tuple[Tensor, TokenReport]:
    return -log_probs.mean(), TokenReport(sums={}, maxima={})


def step(folder: Path, backend: Backend) -> float:
    renderer, _ = renderer_and_sampling(folder)
    row = pack(make_groups(renderer), multiple=backend.groups.tensor.size)
    return backend.train_step([row], surprise, 1e-3).sums["loss"]


def group_settings(backend: MegatronBackend) -> dict[str, tuple[float, float, int]]:
    """Parameter -> (factor of the learning rate, weight decay, steps taken) as its optimizer group says."""
    settings = {}
    names = {parameter: name for name, parameter in backend.weights.parameters.items()}
    for part in getattr(backend.optimizer, "chained_optimizers", [backend.optimizer]):
        for group in part.param_groups:
            for parameter in group["params"]:
                taken = int(part.optimizer.state[parameter]["step"])
                settings[names[parameter]] = (group["lr_mult"], group["weight_decay"], taken)
    return settings


def draws(backend: MegatronBackend) -> list[float]:
    """The next number of every generator; moves them."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        forked = float(torch.rand(1))
    return [random.random(), float(np.random.random()), float(torch.rand(1)), forked]


def train_and_save(folder: Path, target: Path) -> dict[str, Any]:
    """Two steps at TP2, then a checkpoint; what this rank held, and what comes next."""
    backend = make(folder, {"tensor": 2})
    for _ in range(2):
        step(folder, backend)
    rank = backend.groups.world.rank
    random.seed(100 + rank)
    np.random.seed(200 + rank)
    torch.manual_seed(300 + rank)
    backend.save(target)
    result = {"state": local_state(backend), "settings": group_settings(backend), "draws": draws(backend)}
    result["loss"] = [step(folder, backend) for _ in range(2)]
    backend.close()
    return result


def load(folder: Path, target: Path, parallel: Mapping[str, int]) -> dict[str, Any]:
    """The same from a fresh backend at another layout, and its place there."""
    backend = make(folder, parallel)
    backend.load(target)
    result = {
        "place": (backend.groups.tensor.rank, backend.groups.tensor.size),
        "state": local_state(backend),
        "settings": group_settings(backend),
        "draws": draws(backend),
    }
    result["loss"] = [step(folder, backend) for _ in range(2)]
    backend.close()
    return result


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    """(model, checkpoint, what each of the two saving ranks held)."""
    folder, target = make_tiny(tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("checkpoint")
    return folder, target, run_ranks(train_and_save, 2, folder, target)


def recut(folder: Path, ranks: list[dict[str, Any]], rank: int, size: int) -> dict[str, Tensor]:
    """Every parameter and moment of the saving ranks, as rank `rank` of `size` should hold it."""
    spec = Qwen3VLSpec.load(folder)
    shapes, expected = hf_shapes(spec), {}
    for rule in rules(spec):
        for kind in ("", " exp_avg", " exp_avg_sq"):
            parts = [held["state"][rule.local + kind] for held in ranks]
            whole = rule.layout.join(parts, [shapes[name] for name in rule.hf])
            expected[rule.local + kind] = rule.layout.shard(whole, rank, size)
            if rule.local == EMBEDDING:
                expected[HEAD + kind] = expected[rule.local + kind]  # the last stage's copy of the tied table
    return expected


LAYOUTS = {
    "tp2": {"tensor": 2},
    "tp1": {},
    "pp2": {"pipeline": 2},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_shard_comes_back(name: str, saved: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    folder, target, ranks = saved
    settings = {key: value for held in ranks for key, value in held["settings"].items()}
    assert {value[0] for value in settings.values()} == {1.0, 0.25, 3.0, 2.0}
    assert {value[2] for value in settings.values()} == {2}
    loaded = run_ranks(load, 2 if LAYOUTS[name] else 1, folder, target, LAYOUTS[name])
    seen: set[str] = set()
    for number, rank in enumerate(loaded):
        expected = recut(folder, ranks, *rank["place"])
        mine = {key: value for key, value in rank["state"].items() if not key.endswith(" step")}
        seen |= set(mine)
        for key, value in mine.items():
            assert torch.equal(value, expected[key]), key
        for key, value in rank["settings"].items():
            assert value == settings[EMBEDDING if key == HEAD else key]
        assert rank["loss"] == pytest.approx(ranks[0]["loss"], rel=1e-5)
        if name == "tp2":
            assert rank["draws"] == ranks[number]["draws"]
            assert rank["loss"] == ranks[number]["loss"]
    assert seen >= {key for held in ranks for key in held["state"] if not key.endswith(" step")}
