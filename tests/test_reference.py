"""The reference policy: scores as the weights that it was made of, moves by its formula; nothing else notices."""

from __future__ import annotations

import functools
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from megatron_vlrl.backends import build_backend
from megatron_vlrl.backends.megatron import optimizer as optimizer_module
from megatron_vlrl.backends.megatron.backend import MegatronBackend
from megatron_vlrl.backends.megatron.names import EMBEDDING, HEAD, rules
from megatron_vlrl.checkpoint.convert import convert_to_hf
from megatron_vlrl.checkpoint.store import CheckpointStore
from megatron_vlrl.models.hf_files import HFWeights
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.models.qwen3_vl.names import hf_shapes
from megatron_vlrl.packing import Microbatch, pack
from megatron_vlrl.parallel.collectives import world_group
from tests.reference import at_rate, backend_options, local_state, make_groups, relative, renderer_and_sampling
from tests.spawn import run_ranks
from tests.test_backend_state import BUCKET_SIZE, draws, surprise, world_of
from tests.tiny import make_tiny

pytestmark = pytest.mark.slow

Layout = Mapping[str, Any]
Tensors = dict[str, Tensor]
# Checkpoints without and with a reference, and the policy and the reference that each run held
Both = tuple[list[Path], list[tuple[Tensors, Tensors]]]
DECAY = 0.9
APART = {
    "distributed": True,
    "overlap": True,
}  # an optimizer cut over data ranks, whose parts come while others compute
LAYOUTS: dict[str, Layout] = {
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "dp2": {"data": 2, **APART},
    "tp2 dp2": {"tensor": 2, "data": 2, **APART},
    "ep2": {"data": 2, "expert": 2, **APART},
    "ep2 pp2": {"pipeline": 2, "data": 2, "expert": 2},
}


def make(folder: Path, layout: Layout, dtype: str = "float32") -> MegatronBackend:
    """`layout`: ParallelConfig's settings, and `distributed`. About ten buckets of parameters."""
    optimizer_module.BUCKET_SIZE = BUCKET_SIZE
    # A large eps: with Adam's own, 1e-7 in a small gradient becomes a whole step of the weight.
    options = backend_options(folder, renderer_and_sampling(folder)[1], eps=1.0, **layout)
    backend = build_backend(replace(options, model=replace(options.model, dtype=dtype)))
    assert isinstance(backend, MegatronBackend)
    return backend


def all_rows(folder: Path, backend: MegatronBackend) -> list[Microbatch]:
    """The five groups, on every rank, in two rows."""
    groups, multiple = make_groups(renderer_and_sampling(folder)[0]), backend.groups.tensor.size
    return [pack(groups[:3], multiple=multiple), pack(groups[3:], multiple=multiple)]


def update(folder: Path, backend: MegatronBackend, lr: float = 1.0) -> float:
    groups, data = make_groups(renderer_and_sampling(folder)[0]), backend.groups.data
    row = pack(groups[data.rank :: data.size], multiple=backend.groups.tensor.size)
    return backend.train_step([row], surprise, at_rate(lr)).sums["loss"]


def scores(folder: Path, backend: MegatronBackend, *, reference: bool = False) -> Tensor:
    """[2, R] log-probs and entropies of all rows."""
    found = backend.score(all_rows(folder, backend), reference=reference)
    return torch.cat([torch.stack([score.log_probs, score.entropies]) for score in found], dim=1)


def weights_of(backend: MegatronBackend) -> Tensors:
    return {name: weight.clone() for name, weight in backend.hf_weights()}


def kept(backend: MegatronBackend) -> Tensors:
    """Copies of this rank's shards of the reference."""
    assert backend._reference is not None
    return {name: weight.clone() for name, weight in backend._reference.weights.items()}


def reference_of(backend: MegatronBackend) -> Tensors:
    """Whole, by Hugging Face name."""
    own = kept(backend)
    by_parameter = {parameter: own[name] for name, parameter in backend.weights.parameters.items()}
    return {name: weight.clone() for name, weight in backend.weights.gather(by_parameter.__getitem__)}


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "dense": make_tiny(tmp_path_factory.mktemp("dense")),
        "experts": make_tiny(tmp_path_factory.mktemp("experts"), moe=True, tied=False),
    }


def folder_for(layout: Layout, folders: dict[str, Path]) -> Path:
    return folders["experts" if "expert" in layout else "dense"]


def follow(folder: Path, layout: Layout) -> tuple[Tensor, Tensors, float]:
    """(scores of a reference that moved once, its weights, how far the policy's scores are from it)."""
    backend = make(folder, layout)
    update(folder, backend)
    backend.keep_reference(moving=True)
    start, before = weights_of(backend), scores(folder, backend)
    assert torch.equal(scores(folder, backend, reference=True), before)
    for _ in range(2):
        update(folder, backend)
        assert torch.equal(scores(folder, backend, reference=True), before)
    update(folder, backend)
    backend.move_reference(DECAY)
    policy, moved = weights_of(backend), reference_of(backend)
    for name, weight in start.items():
        expected = DECAY * weight.double() + (1 - DECAY) * policy[name].double()
        torch.testing.assert_close(moved[name], expected.float(), rtol=1e-6, atol=1e-7)
        # To the bit: no layout rounds otherwise than these three operations on the whole tensor.
        assert torch.equal(moved[name], weight + (policy[name] - weight) * (1 - DECAY))
        assert same(weights_of(backend), policy)
    after, now = scores(folder, backend, reference=True), scores(folder, backend)
    with torch.no_grad():
        for name, parameter in backend.weights.parameters.items():
            parameter.copy_(kept(backend)[name])
    assert torch.equal(scores(folder, backend), after)
    backend.close()
    return after, moved, relative(now, after)


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> Callable[[Path], tuple[Tensor, Tensors, float]]:
    """What one process finds; once for each model."""
    return functools.cache(lambda folder: run_ranks(follow, 1, folder, {})[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_stays_while_the_policy_moves_and_follows_when_told(
    layout: str, folders: dict[str, Path], alone: Callable[[Path], tuple[Tensor, Tensors, float]]
) -> None:
    folder = folder_for(LAYOUTS[layout], folders)
    expected, weights, distance = alone(folder)
    assert distance > 1e-3, "the updates moved nothing"
    for found, moved, _ in run_ranks(follow, world_of(LAYOUTS[layout]), folder, LAYOUTS[layout]):
        assert relative(found, expected) < 1e-5
        assert max(relative(moved[name], weight) for name, weight in weights.items()) < 1e-5


def train(folder: Path, layout: Layout, with_reference: bool) -> tuple[list[float], Tensors, list[float]]:
    """(losses, weights and optimizer's state, next random numbers) of three updates."""
    backend, losses = make(folder, layout), []
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    if with_reference:
        backend.keep_reference(moving=True)
    for _ in range(3):
        losses.append(update(folder, backend))
        if with_reference:
            scores(folder, backend, reference=True)
            backend.move_reference(DECAY)
    backend._complete_weights()
    state = local_state(backend)
    backend.close()
    return losses, state, draws()


@pytest.mark.parametrize("layout", ["one", "pp2", "dp2", "ep2"])
def test_training_does_not_notice_it(layout: str, folders: dict[str, Path]) -> None:
    settings = LAYOUTS.get(layout, {})
    folder = folder_for(settings, folders)
    without, with_it = (run_ranks(train, world_of(settings), folder, settings, present) for present in (False, True))
    for (losses, state, numbers), (others, other, drawn) in zip(without, with_it, strict=True):
        assert losses == others
        assert losses[0] != losses[2]
        assert same(state, other)
        assert numbers == drawn


def interrupted(folder: Path) -> None:
    """Scoring fails in the middle of the model."""
    backend = make(folder, {})
    backend.keep_reference(moving=False)
    update(folder, backend)
    before, weights = scores(folder, backend), local_state(backend)
    places = {name: parameter.data_ptr() for name, parameter in backend.weights.parameters.items()}
    seen: Tensors = {}

    def fail(*_: Any) -> None:
        seen.update({name: p.detach().clone() for name, p in backend.weights.parameters.items()})
        raise RuntimeError("in the middle")

    hook = backend.chunks[0].language_model.decoder.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        scores(folder, backend, reference=True)
    hook.remove()
    assert same(seen, kept(backend))
    assert {name: parameter.data_ptr() for name, parameter in backend.weights.parameters.items()} == places
    assert same(local_state(backend), weights)
    assert torch.equal(scores(folder, backend), before)
    update(folder, backend)
    assert not torch.equal(scores(folder, backend), before)
    backend.close()


def test_a_failure_leaves_the_policy_its_weights(folders: dict[str, Path]) -> None:
    run_ranks(interrupted, 1, folders["dense"])


def in_bfloat16(folder: Path) -> tuple[float, float]:
    """Share of weights that one small step changes, in float32 and after rounding to bfloat16."""
    backend = make(folder, {}, "bfloat16")
    before = scores(folder, backend)
    for moving in (False, True):
        backend.keep_reference(moving=moving)
        assert {weight.dtype for weight in kept(backend).values()} == {torch.float32 if moving else torch.bfloat16}
        assert torch.equal(scores(folder, backend, reference=True), before)
    start, decay, times = kept(backend), 0.999, 20
    update(folder, backend)
    changed = [(kept(backend)[name], p.float()) for name, p in backend.weights.parameters.items()]
    for number in range(times):
        backend.move_reference(decay)
        if number == 0:
            once = kept(backend)
    moved = kept(backend)
    for name, parameter in backend.weights.parameters.items():
        assert parameter.dtype == torch.bfloat16
        policy = parameter.double()
        expected = policy + decay**times * (start[name].double() - policy)
        torch.testing.assert_close(moved[name], expected.float(), rtol=1e-5, atol=1e-7)
    backend.close()
    differ = torch.cat([(weight != policy).flatten() for weight, policy in changed])
    step = torch.cat([(once[name] != weight).flatten() for name, weight in start.items()])
    rounded = torch.cat([(once[name].bfloat16() != weight.bfloat16()).flatten() for name, weight in start.items()])
    assert torch.equal(step, differ)
    return float(step.float().mean()), float(rounded.float().mean())


def test_small_steps_are_not_lost_in_rounding(folders: dict[str, Path]) -> None:
    [(exact, rounded)] = run_ranks(in_bfloat16, 1, folders["dense"])
    assert exact > 0.3
    assert rounded < exact / 10


def save_moved(folder: Path, target: Path, layout: Layout) -> dict[str, Any]:
    """What this rank held when an asynchronous save began; the reference moves on while it is written."""
    backend = make(folder, layout)
    backend.keep_reference(moving=True)
    update(folder, backend)
    backend.move_reference(DECAY)
    saving = backend.save(target, asynchronous=True)
    result = held(backend)
    update(folder, backend)
    backend.move_reference(0.0)
    assert not same(kept(backend), result["reference"])
    assert saving is not None
    assert saving.finished(wait=True)
    backend.close()
    return result


def held(backend: MegatronBackend) -> dict[str, Any]:
    """Copies of this rank's shards of both sets of weights, and its place in the tensor group."""
    backend._complete_weights()
    policy = {name: parameter.detach().clone() for name, parameter in backend.weights.parameters.items()}
    tensor = backend.groups.tensor
    return {"reference": kept(backend), "policy": policy, "place": (tensor.rank, tensor.size)}


def load_moved(folder: Path, target: Path, layout: Layout) -> dict[str, Any]:
    backend = make(folder, layout)
    backend.keep_reference(moving=True)
    backend.load(target)
    result = held(backend)
    backend.close()
    return result


KINDS = ("reference", "policy")
PLAIN_EXPERTS = {"data": 2, "expert": 2}
SAVED: dict[str, tuple[Layout, list[Layout]]] = {
    "tp2": ({"tensor": 2}, [{"tensor": 2}, {}, {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}]),
    "vpp2": ({"pipeline": 2, "virtual_pipeline": 2}, [{}, {"tensor": 2}]),
    "dp2": ({"data": 2, **APART}, [{"data": 2, **APART}, {"tensor": 2, **APART}]),
    "ep2": (PLAIN_EXPERTS, [{**PLAIN_EXPERTS, "tensor": 2}, {**PLAIN_EXPERTS, "expert": 1}]),
}


@pytest.mark.parametrize("case", SAVED)
def test_every_shard_comes_back_at_every_layout(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    layout, others = SAVED[case]
    folder = folder_for(layout, folders)
    spec, saved = Qwen3VLSpec.load(folder), run_ranks(save_moved, world_of(layout), folder, tmp_path, layout)
    shapes, table = hf_shapes(spec), {rule.local: rule for rule in rules(spec)}
    shards = {kind: {(r["place"][0], name): w for r in saved for name, w in r[kind].items()} for kind in KINDS}
    degree = saved[0]["place"][1]
    for other in others:
        for rank in run_ranks(load_moved, world_of(other), folder, tmp_path, other):
            assert not same(rank["reference"], rank["policy"])
            for kind in KINDS:
                for name, weight in rank[kind].items():
                    local = name if name in table else name.replace(HEAD, EMBEDDING)  # the last stage's copy
                    rule = table[local]
                    parts = [shards[kind][number, local] for number in range(degree)]
                    whole = rule.layout.join(parts, [shapes[hf] for hf in rule.hf])
                    assert torch.equal(weight, rule.layout.shard(whole, *rank["place"])), (kind, name)


def save_both(folder: Path, target: Path) -> list[tuple[Tensors, Tensors]]:
    """(policy, reference) by local name, of step 1 with a frozen and of step 2 with a moving reference."""
    backend, result = make(folder, {}), []
    store = CheckpointStore(target, keep=2, world=world_group())
    for number, moving in enumerate((False, True), start=1):
        backend.keep_reference(moving=moving)
        update(folder, backend)
        if moving:
            backend.move_reference(DECAY)
        store.save(number, backend.save, layout={})
        found = held(backend)
        result.append((found["policy"], found["reference"]))
    backend.close()
    return result


@pytest.fixture(scope="module")
def both(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Both:
    target = tmp_path_factory.mktemp("checkpoints")
    (result,) = run_ranks(save_both, 1, folders["dense"], target)
    return [target / f"step-{number:08d}" for number in (1, 2)], result


def load_each(folder: Path, checkpoints: list[Path], kind: str) -> list[tuple[Tensors, Tensors]]:
    """(policy, reference) from the start and after loading each checkpoint. kind: of the reference that is kept."""
    backend = make(folder, {})
    if kind != "none":
        backend.keep_reference(moving=kind == "moving")
    result = []
    for checkpoint in [None, *checkpoints]:
        if checkpoint:
            backend.load(checkpoint)
        policy = {name: parameter.detach().clone() for name, parameter in backend.weights.parameters.items()}
        result.append((policy, {} if kind == "none" else kept(backend)))
    backend.close()
    return result


@pytest.mark.parametrize("kind", ["none", "frozen", "moving"])
def test_what_a_checkpoint_and_a_run_do_not_share_is_left_as_it_is(
    kind: str, folders: dict[str, Path], both: Both
) -> None:
    checkpoints, expected = both
    (found,) = run_ranks(load_each, 1, folders["dense"], checkpoints, kind)
    _, start = found[0]
    assert not same(*expected[1])
    for (policy, _), (wanted, _) in zip(found[1:], expected, strict=True):
        assert same(policy, wanted)
    assert same(found[1][1], start)
    assert same(found[2][1], expected[1][1] if kind == "moving" else start)


def test_a_checkpoint_older_than_references_is_read(folders: dict[str, Path], both: Both, tmp_path: Path) -> None:
    checkpoints, expected = both
    older = shutil.copytree(checkpoints[0], tmp_path / "older")
    common = torch.load(older / "common.pt", weights_only=False)
    assert common.pop("has_reference") is False
    torch.save(common, older / "common.pt")
    (found,) = run_ranks(load_each, 1, folders["dense"], [older], "moving")
    assert same(found[1][0], expected[0][0])
    assert same(found[1][1], found[0][1])


def test_only_a_moving_one_is_saved_and_neither_is_exported(
    folders: dict[str, Path], both: Both, tmp_path: Path
) -> None:
    checkpoints, expected = both
    keys = [set(FileSystemReader(checkpoint).read_metadata().state_dict_metadata) for checkpoint in checkpoints]
    assert not [key for key in keys[0] if key.startswith("reference.")]
    weights = {
        key for key in keys[0] if key.startswith(("language_model.", "vision_model.")) and "_extra_state" not in key
    }
    assert keys[1] - keys[0] == {f"reference.{key}" for key in weights}
    for number, checkpoint in enumerate(checkpoints):
        convert_to_hf(checkpoint, tmp_path / f"{number}", source=folders["dense"])
        exported, name = HFWeights(tmp_path / f"{number}"), "model.language_model.embed_tokens.weight"
        assert torch.equal(exported.get(name), expected[number][0][EMBEDDING])
        assert not torch.equal(exported.get(name), expected[number][1][EMBEDDING])
