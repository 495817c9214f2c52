"""Qwen3-VL-MoE equals transformers in every layout: scores, loss and gradients; its weights go in and out unchanged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_vlrl.backends import build_backend
from megatron_vlrl.backends.layout import check_layout
from megatron_vlrl.backends.megatron import cpu
from megatron_vlrl.backends.megatron import weights as weights_module
from megatron_vlrl.backends.megatron.names import rules
from megatron_vlrl.config.schema import ModelConfig
from megatron_vlrl.errors import ConfigError, ModelError
from megatron_vlrl.models.hf_files import HFWeights
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.models.qwen3_vl.names import EXPERTS, hf_shapes
from megatron_vlrl.parallel.dims import ParallelDims
from tests.reference import (
    Reference,
    at_rate,
    backend_options,
    hf_reference,
    hf_scores,
    local_state,
    make_groups,
    make_microbatches,
    relative,
    renderer_and_sampling,
    token_loss,
)
from tests.run_folder import Inputs, differences, inputs, records, run, train, write_config  # noqa: F401
from tests.spawn import run_ranks
from tests.spec import SPEC
from tests.tiny import make_tiny

MOE = replace(SPEC, text=replace(SPEC.text, experts=4, experts_per_token=2, expert_ffn_size=48, dense_layers=(1,)))
# The microbatches of each data rank. In `UNEVEN` ranks that share experts have three and one.
EVEN, UNEVEN = [[[0, 1, 2]], [[3, 4]]], [[[0], [1], [2]], [[3, 4]]]
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "tp2 sp": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "dp2": {"data": 2},
    "dp2 ep2": {"data": 2, "expert": 2},
}
LARGE: dict[str, dict[str, Any]] = {
    "tp2 sp dp2 ep2, recompute full": {"tensor": 2, "data": 2, "expert": 2, "recompute": "full"},
    "pp2 vpp2 dp2 ep2, overlap": {
        "pipeline": 2,
        "virtual_pipeline": 2,
        "data": 2,
        "expert": 2,
        "overlap": True,
        "distributed": True,
    },
    "dp4 ep2, distributed": {"data": 4, "expert": 2, "distributed": True},
}


def world(parallel: dict[str, Any]) -> int:
    return parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("data", 1)


def cuts_of(backend: Any) -> list[list[int]]:
    """This rank's microbatches: lists of groups."""
    data, expert = backend.groups.data, backend.groups.expert
    if data.size == 1:
        return [cut for rank in EVEN for cut in rank]
    if data.size == 4:
        return [[[0], [1]], [[2]], [[3]], [[4]]][data.rank]
    return (UNEVEN if expert.size > 1 else EVEN)[data.rank]


def make_reference(folder: Path) -> None:
    """Write the padded reference beside the model, once for all layouts."""
    renderer, sampling = renderer_and_sampling(folder)
    torch.save(vars(hf_reference(folder, make_groups(renderer), sampling)), folder / "reference.pt")


def compare(folder: Path, source: Path, parallel: dict[str, Any]) -> dict[str, float]:
    """Errors of a step with the weights in `source` at this rank's layout, and how many weights came out different."""
    weights_module.BUCKET_BYTES = 2**15
    renderer, sampling = renderer_and_sampling(folder)
    groups = make_groups(renderer)
    reference = Reference(**torch.load(folder / "reference.pt", weights_only=True))
    backend: Any = build_backend(backend_options(source, sampling, **parallel))
    multiple = backend.groups.tensor.size
    batches = make_microbatches(groups, reference, cuts_of(backend), multiple)
    whole = backend.score(make_microbatches(groups, reference, [range(len(groups))], multiple))[0]
    update = backend.train_step(batches, token_loss, at_rate(0.0))
    gradients = {name: upright(name, gradient, reference) for name, gradient in backend.hf_gradients()}
    assert set(gradients) == set(reference.gradients)
    stored = dict(HFWeights(source).items())
    given = dict(backend.hf_weights())
    assert set(given) == set(stored)
    weights_module.BUCKET_BYTES = 1
    again = dict(backend.hf_weights())
    backend.close()
    norm = float(torch.stack([gradient.norm() for gradient in reference.gradients.values()]).norm())
    return {
        "log_probs": relative(whole.log_probs, reference.log_probs),
        "entropies": relative(whole.entropies, reference.entropies),
        "loss": abs(update.sums["loss"] - float(reference.loss)) / float(reference.loss_scale),
        "gradients": max(relative(gradients[name], expected) for name, expected in reference.gradients.items()),
        "grad_norm": abs(update.grad_norm - norm) / norm,
        "tokens": update.sums["tokens"] - len(reference.log_probs),
        "weights": sum(not (torch.equal(given[n], w) and torch.equal(again[n], w)) for n, w in stored.items()),
    }


def upright(name: str, gradient: torch.Tensor, reference: Reference) -> torch.Tensor:
    """As the gradient of transformers' own parameter."""
    return gradient if gradient.shape == reference.gradients[name].shape else gradient.transpose(1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers: the second dense, the others with 4 experts, 2 for each token."""
    folder = make_tiny(tmp_path_factory.mktemp("moe"), moe=True)
    run_ranks(make_reference, 1, folder)
    return folder


@pytest.fixture(scope="module")
def transposed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as the published folders hold it: experts [E, in, out]."""
    target = tmp_path_factory.mktemp("published")
    for file in folder.iterdir():
        if file.suffix in (".json", ".jinja"):
            (target / file.name).write_bytes(file.read_bytes())
    tensors = {
        name: tensor.transpose(1, 2).contiguous() if name.endswith(EXPERTS) else tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.layouts
@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_layout_equals_transformers(name: str, folder: Path, transposed: Path) -> None:
    parallel = (LAYOUTS | LARGE)[name]
    source = transposed if name in ("dp2 ep2", "tp2 sp") else folder
    for errors in run_ranks(compare, world(parallel), folder, source, parallel, timeout=60):
        print(name, {key: f"{value:.1e}" for key, value in errors.items()})
        assert max(errors.values()) < 1e-5, errors


def log_probs(folder: Path) -> torch.Tensor:
    """Of the first group, by transformers."""
    renderer, sampling = renderer_and_sampling(folder)
    return hf_scores(folder, make_groups(renderer)[:1], sampling)[0].detach()


def test_transformers_takes_both_forms_for_the_same_model(folder: Path, transposed: Path) -> None:
    (mine,), (published,) = run_ranks(log_probs, 1, folder), run_ranks(log_probs, 1, transposed)
    assert torch.equal(mine, published)
    assert HFWeights(folder).shape(f"model.language_model.layers.0.{EXPERTS[0]}") == (4, 96, 64)
    assert HFWeights(transposed).shape(f"model.language_model.layers.0.{EXPERTS[0]}") == (4, 64, 96)


def updated(folder: Path, target: Path, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two updates at the layout `first`, or what was saved after them at `second`, then one more update."""
    renderer, sampling = renderer_and_sampling(folder)
    reference = Reference(**torch.load(folder / "reference.pt", weights_only=True))
    backend = build_backend(backend_options(folder, sampling, **(second or first)))
    step = at_rate(1e-3, clip_norm=0.1)
    batches = make_microbatches(make_groups(renderer), reference, cuts_of(backend), backend.groups.tensor.size)
    if second:
        backend.load(target)
    else:
        for _ in range(2):
            backend.train_step(batches, token_loss, step)
        backend.save(target)
    saved = {name: weight.clone() for name, weight in backend.hf_weights()}
    update = backend.train_step(batches, token_loss, step)
    result = {
        "saved": saved,
        "loss": update.sums["loss"],
        "norm": update.grad_norm,
        "after": dict(backend.hf_weights()),
    }
    backend.close()
    return result


@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        ("dp2 ep2", "tp2 sp"),
        pytest.param("dp2 ep2", "dp2", marks=pytest.mark.slow),
        pytest.param("dp4 ep2, distributed", "tp2 sp dp2 ep2, recompute full", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_checkpoint_goes_on_at_another_layout(saving: str, loading: str, folder: Path, tmp_path: Path) -> None:
    first, second = (LAYOUTS | LARGE)[saving], (LAYOUTS | LARGE)[loading]
    second = {**second, "distributed": first.get("distributed", False)}
    shared = run_ranks(updated, world(first), folder, tmp_path, first, {}, timeout=60)[0]
    other = run_ranks(updated, world(second), folder, tmp_path, {}, second, timeout=60)[0]
    for tensor, weight in shared["saved"].items():
        assert torch.equal(other["saved"][tensor], weight), tensor
    assert other["norm"] == pytest.approx(shared["norm"], rel=1e-4)
    # Adam's step is the same only if its moments came along: it would be lr in every element without them.
    moved = torch.cat([(shared["after"][n] - w).flatten() for n, w in shared["saved"].items()])
    moved_too = torch.cat([(other["after"][n] - w).flatten() for n, w in shared["saved"].items()])
    assert relative(moved_too, moved) < 1e-2
    assert moved.norm() > 0


def frozen(folder: Path) -> tuple[set[str], int]:
    """(parameters of this rank that an update left alone, how many there are) with one layer's experts frozen."""
    renderer, sampling = renderer_and_sampling(folder)
    reference = Reference(**torch.load(folder / "reference.pt", weights_only=True))
    options = backend_options(folder, sampling, data=2, expert=2)
    model = ModelConfig(path=str(folder), freeze=("*layers.2.mlp.experts.down_proj",))
    backend: Any = build_backend(replace(options, model=model))
    before = local_state(backend)
    batches = make_microbatches(make_groups(renderer), reference, cuts_of(backend), 1)
    backend.train_step(batches, token_loss, at_rate(1e-3))
    same = {name for name, p in backend.weights.parameters.items() if torch.equal(p, before[name])}
    backend.close()
    return same, len(backend.weights.parameters)


def test_experts_are_frozen_by_their_hugging_face_name(folder: Path) -> None:
    (first, count), (second, _) = run_ranks(frozen, 2, folder, timeout=40)
    name = "language_model.decoder.layers.2.mlp.experts.local_experts.{}.linear_fc2.weight"
    assert first == {name.format(0), name.format(1)}
    assert second == {name.format(2), name.format(3)}
    assert count > 50


@pytest.mark.slow
def test_a_run_with_shared_experts_is_the_run_of_one_process(
    transposed: Path,
    inputs: Inputs,  # noqa: F811
    tmp_path: Path,
) -> None:
    steps = []
    for name, layout in (("alone", []), ("shared", ["parallel.data=2", "parallel.expert=2"])):
        config = write_config(tmp_path / name / "run.yaml", inputs, model={"path": str(transposed)})
        run(train(config, *layout), 2 if layout else 1, tmp_path / name / "out").ok()
        steps.append(records(tmp_path / name / "run"))
        assert load_file(tmp_path / name / "run/hf/model.safetensors").keys() == set(HFWeights(transposed).names)
    for one, other in zip(*steps, strict=True):
        # The engine's experts are transformers' own, those of the update megatron-core's.
        assert max(step.pop("mismatch_max") for step in (one, other)) < 1e-4
        both = {key: value for key, value in one.items() if not key.startswith("balance/")}
        assert one["grad_norm"] > 0.1
        assert not differences(both, {key: other[key] for key in both}, relative=1e-4, absolute=1e-6)


def without_the_shim(folder: Path) -> str:
    """What megatron-core's dispatcher says on a CPU."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    cpu.install()
    cpu.install = lambda: None
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = None
    try:
        build_backend(backend_options(folder, renderer_and_sampling(folder)[1]))
    except RuntimeError as error:
        return str(error)
    return "nothing"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is inert where CUDA exists")
def test_megatron_cores_dispatcher_still_needs_its_shim(folder: Path) -> None:
    (said,) = run_ranks(without_the_shim, 1, folder)
    assert "torch.cuda.Stream" in said, "take S5 out of cpu.py"


def gathered_parts() -> tuple[str, torch.Tensor, torch.Tensor]:
    """What gloo says of parts that differ in size, and what S6 makes of them: all rows, and this rank's of a sum."""
    rank, sizes = dist.get_rank(), [3, 1]
    part = torch.full((sizes[rank], 2), float(rank + 1))
    said = "nothing"
    try:
        dist.all_gather([torch.empty(size, 2) for size in sizes], part)
    except RuntimeError as error:
        said = str(error)
    group = dist.group.WORLD
    assert group is not None
    whole = cpu._gather_parts(part, group, sizes)
    return said, whole, cpu._scatter_sum(whole + torch.arange(4.0)[:, None], group, sizes)


def test_gloo_still_needs_parts_of_one_size() -> None:
    rows = torch.tensor([1.0, 1, 1, 2])[:, None].expand(4, 2)
    sums = 2 * (rows + torch.arange(4.0)[:, None])
    for (said, whole, mine), expected in zip(run_ranks(gathered_parts, 2), sums.split([3, 1]), strict=True):
        assert "invalid tensor size" in said, "take S6 out of cpu.py"
        assert torch.equal(whole, rows)
        assert torch.equal(mine, expected)


def test_names_and_shapes_are_those_of_the_folder(folder: Path) -> None:
    spec, weights = Qwen3VLSpec.load(folder), HFWeights(folder)
    assert (spec.text.experts, spec.text.experts_per_token, spec.text.expert_ffn_size) == (4, 2, 48)
    assert spec.text.dense_layers == (1,)
    assert {name: tuple(weights.shape(name)) for name in weights.names} == hf_shapes(spec)
    named = [name for rule in rules(spec) for name in rule.hf]
    assert set(named) == set(hf_shapes(spec))
    assert named.count(f"model.language_model.layers.3.{EXPERTS[1]}") == 4


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_experts": 8, "num_local_experts": None}, {"experts": 8}),
        ({"decoder_sparse_step": 2, "mlp_only_layers": []}, {"dense_layers": (0, 2)}),
        ({"mlp_only_layers": [0, 3]}, {"dense_layers": (0, 3)}),
        ({"norm_topk_prob": True}, {"experts": 4}),
    ],
)
def test_what_the_config_says_of_experts(
    change: dict[str, Any], expected: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    text = Qwen3VLSpec.load(changed(folder, tmp_path, change)).text
    assert {name: getattr(text, name) for name in expected} == expected


def changed(folder: Path, target: Path, change: dict[str, Any]) -> Path:
    """`folder`'s config.json with some of its text_config replaced, or taken out where None."""
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"] = {key: value for key, value in (raw["text_config"] | change).items() if value is not None}
    (target / "config.json").write_text(json.dumps(raw))
    return target


def test_weights_that_are_not_normalised_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="norm_topk_prob"):
        Qwen3VLSpec.load(changed(folder, tmp_path, {"norm_topk_prob": False}))


@pytest.mark.parametrize(
    ("text", "dims", "said"),
    [
        ({}, {"data": 3, "expert": 3}, "parallel.expert=3 does not divide 4 experts"),
        ({"expert_ffn_size": 45}, {"tensor": 2, "sequence": True}, "45 width of an expert"),
        ({}, {"tensor": 2}, "needs parallel.sequence"),
        ({"experts_per_token": 1}, {}, "1 of 4 experts"),
        ({"experts_per_token": 5}, {}, "5 of 4 experts"),
        ({"experts": 0}, {"data": 2, "expert": 2}, "the model has none"),
    ],
)
def test_what_does_not_work_is_refused(text: dict[str, int], dims: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_layout(replace(MOE, text=replace(MOE.text, **text)), ParallelDims(**dims))
    assert said in str(caught.value)
    assert ";" not in str(caught.value).split("(")[0].replace("; use a divisor", "").replace("; 2 or more", "")


def test_experts_are_shared_by_a_divisor_of_the_data_ranks() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.expert=2 does not divide parallel\.data=3"):
        ParallelDims(data=3, expert=2)
    check_layout(MOE, ParallelDims(tensor=2, data=4, expert=4, sequence=True))


def test_the_width_of_dense_layers_counts_only_where_there_are_some() -> None:
    odd = replace(MOE, text=replace(MOE.text, ffn_size=97))
    with pytest.raises(ConfigError, match="97 feed-forward width"):
        check_layout(odd, ParallelDims(tensor=2, sequence=True))
    check_layout(replace(odd, text=replace(odd.text, dense_layers=())), ParallelDims(tensor=2, sequence=True))
