"""AdamW through megatron-core is torch's AdamW by Hugging Face name; bad names and non-finite steps change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vlrl.backends import Backend, build_backend
from megatron_vlrl.backends.megatron import optimizer
from megatron_vlrl.backends.megatron.adam import FusedAdam
from megatron_vlrl.backends.megatron.names import EMBEDDING, HEAD, rules
from megatron_vlrl.backends.megatron.optimizer import freeze, match_names
from megatron_vlrl.backends.protocol import OptimizerStep, TokenReport
from megatron_vlrl.config.schema import ModelConfig, OptimizerConfig
from megatron_vlrl.errors import ConfigError
from megatron_vlrl.packing import Microbatch, pack
from megatron_vlrl.types import RolloutGroup
from tests.reference import at_rate, backend_options, make_groups, relative, renderer_and_sampling
from tests.spawn import run_ranks
from tests.spec import SPEC
from tests.tiny import make_tiny

CONFIG = OptimizerConfig(
    betas=(0.8, 0.9),
    eps=1e-3,  # so large that a gradient of nothing but rounding does not decide a step
    lr_scale={"model.visual.*": 0.25, "model.visual.merger.*": 3.0, "*.layers.1.*": 0.5, "*.embed_tokens.*": 2.0},
)
FREEZE = ("*.layers.0.*", "model.visual.pos_embed.weight")
UPDATES = (
    OptimizerStep(lr=1e-2, clip_norm=0.5, weight_decay=0.3),
    OptimizerStep(lr=2e-3, clip_norm=0.2, weight_decay=3.0),
    OptimizerStep(lr=5e-3, clip_norm=0.0, weight_decay=0.1),
)
BAD = ("loss", "gradient")


def frozen(name: str) -> bool:
    return any(fnmatchcase(name, glob) for glob in FREEZE)


def factor(name: str) -> float:
    """The last glob that matches counts."""
    return [1.0, *(value for glob, value in CONFIG.lr_scale.items() if fnmatchcase(name, glob))][-1]


def mean_surprise(batch: Microbatch, log_probs: Tensor, entropies: Tensor) -> tuple[Tensor, TokenReport]:
    return -log_probs.mean() + 0.1 * entropies.mean(), TokenReport(sums={}, maxima={})


def spoilt(kind: str, *, here: bool) -> Callable[..., tuple[Tensor, TokenReport]]:
    """On the rank that is `here`, a loss that is not finite, or a finite one whose gradient is not."""

    def loss(batch: Microbatch, log_probs: Tensor, entropies: Tensor) -> tuple[Tensor, TokenReport]:
        value, report = mean_surprise(batch, log_probs, entropies)
        if here:
            # The root's slope at 0 is infinite; its value is 0.
            value = value * math.inf if kind == "loss" else value + (log_probs - log_probs.detach()).abs().sqrt().sum()
        return value, report

    return loss


def torch_adamw(weights: dict[str, Tensor]) -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
    """The same settings written out for each tensor: `decays` or not, factors of the rate, frozen ones left out."""
    parameters = {name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items() if not frozen(name)}
    groups = [
        {
            "params": [parameter],
            "factor": factor(name),
            "decays": parameter.dim() > 1,
        }
        for name, parameter in parameters.items()
    ]
    return parameters, torch.optim.AdamW(groups, betas=CONFIG.betas, eps=CONFIG.eps)


def copy_of(backend: Backend) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in backend.hf_weights()}


def make(folder: Path, layout: dict[str, Any]) -> Backend:
    """`layout`: ParallelConfig's settings, and `distributed`."""
    optimizer.BUCKET_SIZE = 10_000
    _, sampling = renderer_and_sampling(folder)
    config = replace(CONFIG, distributed=layout.get("distributed", False))
    options = backend_options(folder, sampling, **{key: layout[key] for key in layout if key != "distributed"})
    return build_backend(replace(options, model=ModelConfig(path=str(folder), freeze=FREEZE), optimizer=config))


def train(folder: Path, layout: dict[str, Any]) -> list[dict[str, Any]]:
    """Three good steps, and bad ones before the last where there are data ranks; how far weights are from torch's."""
    renderer, _ = renderer_and_sampling(folder)
    backend = make(folder, layout)
    data = backend.groups.data
    groups: list[RolloutGroup] = make_groups(renderer)
    batches = [pack(groups[data.rank :: data.size], multiple=backend.groups.tensor.size)]
    before = copy_of(backend)
    parameters, reference = torch_adamw(before)
    results = []
    for number, step in enumerate(UPDATES):
        if number == 2 and data.size > 1:
            results += [bad_step(backend, batches, kind) for kind in BAD]
        update = backend.train_step(batches, mean_surprise, step)
        gradients = dict(backend.hf_gradients())
        for group, (name, parameter) in zip(reference.param_groups, parameters.items(), strict=True):
            group["lr"] = step.lr * group["factor"]
            group["weight_decay"] = step.weight_decay if group["decays"] else 0.0
            parameter.grad = gradients[name].clone()
        reference.step()
        after = copy_of(backend)
        head = backend.weights.parameters.get(HEAD)
        results.append(
            {
                "tied": head is None or torch.equal(head, after["model.language_model.embed_tokens.weight"]),
                "skipped": update.skipped,
                "norm": update.grad_norm,
                "clipped": float(torch.stack([gradients[name].norm() for name in parameters]).norm()),
                "frozen": [name for name in before if frozen(name) and not torch.equal(before[name], after[name])],
                "still": [name for name in parameters if torch.equal(before[name], after[name])],
                "moved": {
                    name: relative(after[name] - before[name], p.detach() - before[name])
                    for name, p in parameters.items()
                },
            }
        )
    backend.close()
    return results


def everything(backend: Any) -> dict[str, Tensor]:
    """Copies of this rank's weights and of all that its optimizer keeps."""
    kept = {name: weight.detach().clone() for name, weight in backend.weights.parameters.items()}
    for index, part in enumerate(optimizer.parts_of(backend.optimizer)):
        for place, state in enumerate(part.optimizer.state.values()):
            kept |= {f"{index} {place} {key}": value.clone() for key, value in state.items()}
        steps = [group["step"] for group in part.optimizer.param_groups]
        kept[f"{index} steps"] = torch.tensor(steps)
    return kept


def bad_step(backend: Backend, batches: list[Microbatch], kind: str) -> dict[str, Any]:
    """A step that is not finite on one data rank."""
    before = everything(backend)
    update = backend.train_step(batches, spoilt(kind, here=backend.groups.data.rank == 1), at_rate(1e-2))
    after = everything(backend)
    assert set(before) == set(after)
    return {
        "skipped": update.skipped,
        "finite": math.isfinite(update.sums["loss"]),
        "changed": [name for name in before if not torch.equal(before[name], after[name])],
        "compared": len(before),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"), layers=4)


LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {"data": 2},
    "overlap": {"data": 2, "overlap": True},
    "distributed": {"data": 2, "distributed": True},
    "distributed, overlap": {"data": 2, "distributed": True, "overlap": True},
}


@pytest.fixture(scope="module", params=["plain", "distributed, overlap"])
def ranks(folder: Path, request: pytest.FixtureRequest) -> list[list[dict[str, Any]]]:
    return run_ranks(train, 2, folder, LAYOUTS[request.param])


def check_steps(steps: list[dict[str, Any]]) -> None:
    for step, settings in zip(steps, UPDATES, strict=True):
        assert step["skipped"] is None
        assert step["norm"] > settings.clip_norm
        assert step["clipped"] == pytest.approx(settings.clip_norm or step["norm"], rel=1e-5)
        assert step["frozen"] == []
        assert step["still"] == []
        assert step["tied"]
        assert max(step["moved"].values()) < 1e-4, step["moved"]


def test_three_steps_are_torchs_adamw(ranks: list[list[dict[str, Any]]]) -> None:
    for steps in ranks:
        check_steps([steps[index] for index in (0, 1, 4)])


def test_three_steps_of_two_stages_are_torchs_adamw(folder: Path) -> None:
    for steps in run_ranks(train, 2, folder, {"pipeline": 2}):
        assert len(steps) == 3
        check_steps(steps)


def train_with_frozen_table(folder: Path) -> tuple[list[str], int]:
    """Names whose local shards moved, and how many there are, where the tied table lies frozen on both stages."""
    renderer, sampling = renderer_and_sampling(folder)
    model = ModelConfig(path=str(folder), freeze=("*.embed_tokens.weight",))
    backend = build_backend(replace(backend_options(folder, sampling, pipeline=2), model=model))
    before = {name: weight.clone() for name, weight in backend.weights.parameters.items()}
    backend.train_step([pack(make_groups(renderer))], mean_surprise, at_rate(1e-2))
    moved = [name for name, weight in backend.weights.parameters.items() if not torch.equal(weight, before[name])]
    backend.close()
    return moved, len(before)


def test_a_frozen_tied_table_stays_on_both_stages(folder: Path) -> None:
    for moved, count in run_ranks(train_with_frozen_table, 2, folder):
        assert len(moved) == count - 1
        assert not {EMBEDDING, HEAD} & set(moved)


# For each step, the groups of each data rank's microbatches (0, 2 and 3 have images): one rank alone sees images,
# then none in its last microbatch, then the other one, then nobody.
STEPS = (([[0], [2]], [[4], [1]]), ([[3], [1]], [[0, 2], [4]]), ([[1], [4]], [[2], [0, 3]]), ([[1]], [[4]]))


def count_early_starts(backend: Any) -> list[int]:
    """For each step to come, how many buckets' reductions began during the backward pass."""
    started: list[int] = []
    if backend._overlap:
        start_rest = backend._overlap.start_rest

        def counted() -> None:
            started.append(backend._overlap._started)
            start_rest()

        backend._overlap.start_rest = counted
    return started


def images_here_and_there(folder: Path, layout: dict[str, Any]) -> list[dict[str, Tensor]]:
    """After each step: log-probs as a step's score sees them, gradients, weights and the norm.

    Not clipped: the norm is added up in another order where the optimizer is distributed.
    """
    renderer, _ = renderer_and_sampling(folder)
    backend = make(folder, layout)
    groups, rank = make_groups(renderer), backend.groups.data.rank
    started = count_early_starts(backend)
    results = []
    for number, cuts in enumerate(STEPS):
        batches = [pack([groups[index] for index in cut]) for cut in cuts[rank]]
        if number == 2:
            assert backend.train_step(batches, spoilt("loss", here=rank == 1), at_rate(1e-2)).skipped
        update = backend.train_step(batches, mean_surprise, at_rate(1e-2))
        result = {"norm": torch.tensor(update.grad_norm), "score": backend.score(batches)[-1].log_probs.clone()}
        result |= {f"gradient of {name}": gradient.clone() for name, gradient in backend.hf_gradients()}
        results.append(result | copy_of(backend))
    if layout.get("overlap") and "pipeline" not in layout:  # only a first stage has more than one bucket
        buckets = len(backend._overlap._buckets)
        assert len(started) == len(STEPS) + 1
        assert buckets > 5
        assert min(started) > buckets // 2, started
        assert (started[0] == buckets) == (rank == 0)  # only there the last microbatch has an image
    backend.close()
    return results


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[list[dict[str, Tensor]]]:
    return run_ranks(images_here_and_there, 2, folder, LAYOUTS["plain"])


@pytest.mark.parametrize("name", ["overlap", "distributed", "distributed, overlap"])
def test_images_on_some_ranks_only(name: str, folder: Path, plain: list[list[dict[str, Tensor]]]) -> None:
    for rank, expected in zip(run_ranks(images_here_and_there, 2, folder, LAYOUTS[name]), plain, strict=True):
        assert len(rank) == len(STEPS)
        for step, reference in zip(rank, expected, strict=True):
            assert set(step) == set(reference)
            far = {key: relative(step[key], reference[key]) for key in step}
            assert far.pop("norm") < 1e-6
            assert max(far.values()) < 1e-6, {key: value for key, value in far.items() if value >= 1e-6}
        moved = [key for key in rank[0] if "gradient" in key and rank[0][key].any()]
        assert any("visual.merger" in key for key in moved)
        assert not any(rank[-1][key].any() for key in rank[-1] if "gradient of model.visual" in key)


@pytest.mark.slow
def test_interleaved_stages_that_overlap(folder: Path, plain: list[list[dict[str, Tensor]]]) -> None:
    layout = {"data": 2, "pipeline": 2, "virtual_pipeline": 2, "distributed": True, "overlap": True}
    for rank in run_ranks(images_here_and_there, 4, folder, layout):
        for step, reference, limit in zip(rank, plain[0], (1e-6, 1e-5, 1e-5, 1e-5), strict=True):
            far = {key: relative(value, reference[key]) for key, value in step.items() if key != "score"}
            assert set(step) == set(reference)
            assert max(far.values()) < limit, far


def test_the_stand_in_is_torchs_adamw_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in [(3, 5), (7,), (2, 2, 2)]]
    results = []
    for kind in (torch.optim.AdamW, FusedAdam):
        generator.manual_seed(1)
        parameters = [torch.nn.Parameter(value.clone()) for value in start]
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0, "lr": 0.3}]
        adam = kind(groups, lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)
        for number in range(5):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            if number == 3:
                adam.load_state_dict(adam.state_dict())
            adam.step()
        results.append([*parameters, *(adam.state[p][key] for p in parameters for key in ("exp_avg", "exp_avg_sq"))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_the_settings_are_all_in_use() -> None:
    names = [name for rule in rules(SPEC) for name in rule.hf]
    assert {factor(name) for name in names if not frozen(name)} == {1.0, 0.25, 3.0, 0.5, 2.0}
    assert factor("model.visual.merger.norm.weight") == 3.0
    assert any(frozen(name) for name in names)


@pytest.mark.parametrize(
    ("number", "reason", "finite"), [(2, "non-finite loss", False), (3, "non-finite gradient", True)]
)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(
    ranks: list[list[dict[str, Any]]], number: int, reason: str, finite: bool
) -> None:
    for steps in ranks:
        step = steps[number]
        assert step["skipped"] == reason
        assert step["finite"] == finite
        assert step["changed"] == []
        assert step["compared"] > 100


def test_the_last_glob_that_matches_counts() -> None:
    matched = match_names(["model.visual.*", "model.visual.merger.*"], rules(SPEC), key="optimizer.lr_scale")
    assert matched["vision_model.merger.norm.weight"] == "model.visual.merger.*"
    assert matched["vision_model.patch_embed.weight"] == "model.visual.*"
    assert not [name for name in matched if name.startswith("language_model")]


@pytest.mark.parametrize("tied", [True, False])
def test_the_copy_of_a_tied_table_follows_it(tied: bool) -> None:
    table = rules(replace(SPEC, tied_embeddings=tied))
    matched = match_names(["*.embed_tokens.*"], table, key="model.freeze")
    assert set(matched) == ({EMBEDDING, HEAD} if tied else {EMBEDDING})


@pytest.mark.parametrize("key", ["optimizer.lr_scale", "model.freeze"])
def test_a_name_that_matches_nothing_is_an_error(key: str) -> None:
    with pytest.raises(ConfigError, match=r"matches no parameter.*model\.language_model\.embed_tokens") as caught:
        match_names(["model.visual.*", "model.vision.*"], rules(SPEC), key=key)
    assert str(caught.value).startswith(f"{key}: 'model.vision.*'")


@pytest.mark.parametrize(
    ("glob", "others"),
    [("*.layers.1.self_attn.q_proj.weight", ["k_proj", "v_proj"]), ("*.mlp.gate_proj.*", ["up_proj"])],
)
def test_a_part_of_a_merged_parameter_is_an_error(glob: str, others: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        freeze({}, rules(SPEC), [glob])
    for part in ("model.freeze", repr(glob), "match all of them or none", *others):
        assert part in str(caught.value)
