"""The memory of a rank as planned is what a real one holds: state to the byte, activations within 10%."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlrl.backends.activations import CHUNK_NUMBERS, Row, head_workspace, stage_activations
from megatron_vlrl.backends.memory import Training, fullest_rank, rank_memory
from megatron_vlrl.models.qwen3_vl.sizes import SIZES
from megatron_vlrl.packing import Microbatch, Targets, pack
from megatron_vlrl.parallel.dims import ParallelDims
from tests.reference import at_rate, backend_options, make_groups, renderer_and_sampling, token_loss
from tests.saved_bytes import LiveBytes, saved_bytes
from tests.spawn import run_ranks
from tests.spec import SPEC
from tests.tiny import make_tiny

WIDTHS = {"float32": 4, "bfloat16": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "dense": make_tiny(tmp_path_factory.mktemp("dense")),
        "moe": make_tiny(tmp_path_factory.mktemp("moe"), moe=True),
    }


def microbatch(renderer: Any, lengths: list[int], count: int, multiple: int) -> tuple[Microbatch, Row]:
    """`count` groups of one image and answers of equal `lengths`, and the plan's word for it."""
    groups = make_groups(renderer, [[(96, 64)]] * count, [lengths] * count, ["count"] * count)
    batch = pack(groups, multiple=multiple)
    number = len(batch.target_ids)
    zeros = torch.zeros(number)
    targets = Targets(
        rollout_log_probs=zeros,
        old_log_probs=zeros,
        advantages=zeros + 1,
        weights=zeros + 1 / number,
        entropy_weights=zeros,
        kl_weights=zeros,
        task=torch.zeros(number, dtype=torch.long),
        counted=zeros + 1,
        fresh=zeros + 1,
    )
    prompt = groups[0].prompt
    row = Row(
        prompts=count,
        prompt=len(prompt.token_ids),
        image=len(prompt.patches[0]) // 4,
        responses=len(lengths),
        response=lengths[0],
    )
    return batch.with_targets(targets), row


def build(folder: Path, parallel: dict[str, Any], dtype: str) -> Any:
    """A backend of these settings."""
    from megatron_vlrl.backends import build_backend

    _, sampling = renderer_and_sampling(folder)
    options = backend_options(folder, sampling, **parallel)
    return build_backend(replace(options, model=replace(options.model, dtype=dtype)))


def quiet_loss(batch: Microbatch, log_probs: torch.Tensor, entropies: torch.Tensor) -> Any:
    """`token_loss` whose report keeps no graph alive."""
    loss, report = token_loss(batch, log_probs, entropies)
    return loss, replace(report, maxima={name: value.detach() for name, value in report.maxima.items()})


def full_pipeline(backend: Any, folder: Path, shape: str) -> tuple[list[Microbatch], Row]:
    """As many rows as fill the pipeline, sharing nothing, and the plan's word for one of them."""
    renderer, _ = renderer_and_sampling(folder)
    dims = backend.groups.dims
    count = 2 * dims.pipeline if dims.virtual > 1 else dims.pipeline
    rows = [microbatch(renderer, *SHAPES[shape], dims.tensor) for _ in range(count)]
    batch, row = rows[0]
    assert 0 <= len(batch.input_ids) - row.tokens < dims.tensor
    assert len(batch.logit_rows) == row.logit_rows
    return [batch for batch, _ in rows], row


def planned_bytes(backend: Any, row: Row, parallel: dict[str, Any], dtype: str) -> dict[str, float]:
    return stage_activations(
        backend.spec,
        row,
        backend.groups.dims,
        WIDTHS[dtype],
        stage=backend.groups.pipeline.rank,
        recompute=parallel.get("recompute", "none"),
        recompute_vision=parallel.get("recompute_vision", False),
    )


def measure(folder: Path, parallel: dict[str, Any], dtype: str, shape: str) -> tuple[float, float]:
    """(bytes that autograd held at its peak in a real step of this rank, bytes as planned)."""
    backend = build(folder, parallel, dtype)
    batches, row = full_pipeline(backend, folder, shape)
    backend.train_step(batches, quiet_loss, at_rate(0.0))
    with saved_bytes(parameter for chunk in backend.chunks for parameter in chunk.parameters()) as account:
        backend.train_step(batches, quiet_loss, at_rate(0.0))
    planned = planned_bytes(backend, row, parallel, dtype)
    backend.close()
    return account.peak, planned["text"] + planned["vision"]


def live(folder: Path, parallel: dict[str, Any], dtype: str, shape: str) -> tuple[float, float]:
    """(peak of all that a step of this rank makes, activations as planned, the pipeline's borders among them)."""
    backend = build(folder, parallel, dtype)
    batches, row = full_pipeline(backend, folder, shape)
    backend.train_step(batches, quiet_loss, at_rate(0.0))
    weights = list(backend.weights.parameters.values())
    moments = [
        value
        for part in getattr(backend.optimizer, "chained_optimizers", [backend.optimizer])
        for state in part.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    with LiveBytes([*weights, *(weight.main_grad for weight in weights), *moments]) as account:
        backend.train_step(batches, quiet_loss, at_rate(0.0))
    planned = planned_bytes(backend, row, parallel, dtype)
    backend.close()
    return account.peak, sum(planned.values())


SHAPES = {"short": ([11, 11], 1), "two": ([11, 11], 2), "long": ([40] * 4, 2)}
MODES = ("none", "selective", "full")
Case = tuple[dict[str, Any], str, str]
ONE_RANK: list[Case] = [
    *(({"recompute": mode}, "float32", shape) for mode in MODES for shape in ("short", "long")),
    *(({"recompute": mode}, "bfloat16", "long") for mode in MODES),
]
TENSOR: list[Case] = [({"tensor": 2}, "float32", "long"), ({"tensor": 2}, "bfloat16", "long")]
INTERLEAVED: list[Case] = [
    ({"pipeline": 2, "virtual_pipeline": 2}, "float32", "long"),
    ({"pipeline": 2, "virtual_pipeline": 2, "recompute": "full"}, "bfloat16", "long"),
]
TWO_RANKS: list[Case] = [
    *TENSOR,
    ({"tensor": 2, "sequence": False}, "float32", "long"),
    ({"pipeline": 2}, "float32", "long"),
    ({"pipeline": 2, "recompute": "full"}, "float32", "long"),
    *INTERLEAVED,
]


def of_all(function: Any, folder: Path, cases: list[Case]) -> list[tuple[float, float]]:
    """`measure` or `live` of each case: processes are started once."""
    return [function(folder, *case) for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "ranks", "cases"),
    [("dense", 1, ONE_RANK), ("moe", 1, ONE_RANK), ("dense", 2, TWO_RANKS), ("moe", 2, [*TENSOR, *INTERLEAVED])],
    ids=["dense", "moe", "dense on two ranks", "moe on two ranks"],
)
def test_activations(kind: str, ranks: int, cases: list[Case], folders: dict[str, Path]) -> None:
    results = run_ranks(of_all, ranks, measure, folders[kind], cases)
    wrong = {}
    for rank, result in enumerate(results):
        for (parallel, dtype, shape), (measured, planned) in zip(cases, result, strict=True):
            name = f"{kind} {parallel} {dtype} {shape}, rank {rank}"
            print(f"{name}: {measured} bytes, planned {planned / measured:.3f} of it")
            if planned != pytest.approx(measured, rel=0.1):
                wrong[name] = (measured, planned)
    assert wrong == {}


@pytest.mark.slow
def test_vision_recompute_saves_what_is_planned(folders: dict[str, Path]) -> None:
    """Its checkpoints keep their inputs out of sight of autograd's hooks: all live tensors are compared instead."""
    cases: list[Case] = [({"recompute_vision": recompute}, "float32", "two") for recompute in (False, True)]
    [[(alive, planned), (alive_again, planned_again)]] = run_ranks(of_all, 1, live, folders["dense"], cases)
    print(f"live {alive} and {alive_again} bytes, planned {planned} and {planned_again}")
    assert planned - planned_again == pytest.approx(alive - alive_again, rel=0.1)
    # The row's patches are planned but were made before; temporary tensors were made but not planned.
    assert planned_again == pytest.approx(alive_again, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_interleaved_stages_hold_what_they_hand_each_other(kind: str, folders: dict[str, Path]) -> None:
    """Out of sight of autograd's hooks too. Of the first rank, as the last one's head makes large temporary tensors."""
    interleaved = {"pipeline": 2, "virtual_pipeline": 2}
    cases: list[Case] = [
        (interleaved, "bfloat16", "long"),
        (interleaved | {"recompute": "selective"}, "bfloat16", "long"),
        (interleaved | {"recompute": "full"}, "float32", "long"),
    ]
    first, _ = run_ranks(of_all, 2, live, folders[kind], cases)
    print([planned / alive for alive, planned in first])
    assert [planned for _, planned in first] == [pytest.approx(alive, rel=0.1) for alive, _ in first]


def held(folder: Path, parallel: dict[str, Any], dtype: str, distributed: bool) -> dict[str, tuple[float, float]]:
    """Use -> (bytes that this rank holds after an update, bytes as planned)."""
    from megatron_vlrl.backends import build_backend

    renderer, sampling = renderer_and_sampling(folder)
    options = backend_options(folder, sampling, **parallel)
    options = replace(
        options,
        model=replace(options.model, dtype=dtype),
        optimizer=replace(options.optimizer, distributed=distributed),
    )
    backend = build_backend(options)
    dims = backend.groups.dims
    batch, row = microbatch(renderer, [11, 11], 1, dims.tensor)
    backend.train_step([batch] * dims.pipeline, token_loss, at_rate(1e-3))
    parameters = list(backend.weights.parameters.values())
    training, stage = Training(width=WIDTHS[dtype], distributed=distributed), backend.groups.pipeline.rank
    planned = rank_memory(backend.spec, dims, row, training, stage)
    optimizer = 0
    for part in getattr(backend.optimizer, "chained_optimizers", [backend.optimizer]):
        inner = part.optimizer
        own = {p.untyped_storage().data_ptr() for p in parameters}
        for group in inner.param_groups if inner is not None else []:
            for parameter in group["params"]:
                moments = (value for key, value in inner.state[parameter].items() if key != "step")
                optimizer += sum(value.numel() * value.element_size() for value in moments)
                if parameter.untyped_storage().data_ptr() not in own:  # a copy in float32
                    optimizer += parameter.numel() * parameter.element_size()
    result = {
        "weights": (sum(p.numel() * p.element_size() for p in parameters), planned.weights),
        "gradients": (sum(p.main_grad.numel() * p.main_grad.element_size() for p in parameters), planned.gradients),
        "optimizer": (optimizer, planned.optimizer),
    }
    for kind in ("frozen", "ema"):
        backend.keep_reference(moving=kind == "ema")
        with_it = rank_memory(backend.spec, dims, row, replace(training, reference=kind), stage)
        result[kind] = (reference_bytes(backend), with_it.reference)
        assert with_it.total - with_it.reference == planned.total
    backend.close()
    return result


def reference_bytes(backend: Any) -> int:
    """Of the kept weights, and of the copies that the model computes with where they differ."""
    with backend._reference.in_use():
        tensors = [*backend._reference.weights.values(), *(p.data for p in backend.weights.parameters.values())]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


STATES: dict[tuple[str, int], list[tuple[dict[str, Any], str, bool]]] = {
    ("dense", 1): [({}, "float32", False), ({}, "bfloat16", False)],
    ("dense", 2): [
        ({"tensor": 2}, "float32", False),
        ({"pipeline": 2}, "bfloat16", False),
        ({"pipeline": 2, "virtual_pipeline": 2}, "float32", False),
        ({"data": 2}, "float32", True),
        ({"data": 2}, "bfloat16", True),
    ],
    ("moe", 2): [
        ({"tensor": 2}, "float32", False),
        ({"data": 2, "expert": 2}, "float32", False),
        ({"data": 2, "expert": 2}, "float32", True),
    ],
}


def hold_all(folder: Path, cases: list[Any]) -> list[dict[str, tuple[float, float]]]:
    """`held` of each case: processes are started once."""
    return [held(folder, *case) for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ranks"), STATES)
def test_weights_gradients_optimizer_and_reference(kind: str, ranks: int, folders: dict[str, Path]) -> None:
    cases = STATES[kind, ranks]
    for case, *results in zip(cases, *run_ranks(hold_all, ranks, folders[kind], cases), strict=True):
        for use in ("weights", "gradients", "frozen", "ema"):
            assert [result[use][0] for result in results] == [result[use][1] for result in results], (case, use)
        measured, planned = ([result["optimizer"][index] for result in results] for index in (0, 1))
        # A distributed optimizer is cut in the middle of parameters: its ranks' parts add up.
        assert (sum(measured) == sum(planned)) if case[-1] else (measured == planned), case


def test_head_holds_one_chunk_of_logits() -> None:
    spec, dims = SIZES["qwen3-vl-8b"], ParallelDims(tensor=2, sequence=True)
    many = Row(prompts=4, prompt=1024, image=0, responses=8, response=512)
    columns = spec.text.vocab_size // 2
    gradient = columns * spec.text.hidden_size
    assert head_workspace(spec, many, dims, 4) == CHUNK_NUMBERS // columns * columns * 4 + gradient * 4
    assert head_workspace(spec, many, dims, 2) == CHUNK_NUMBERS // columns * columns * 6 + gradient * 2
    few = Row(prompts=1, prompt=8, image=0, responses=1, response=3)
    assert head_workspace(spec, few, dims, 4) == 3 * columns * 4 + gradient * 4


def test_row_takes_whole_groups() -> None:
    row = Row.fill(8192, prompt=1024, image=0, responses=8, response=256)
    assert (row.prompts, row.tokens, row.logit_rows) == (2, 6144, 2 * (1 + 8 * 255))
    assert Row.fill(100, prompt=1024, image=0, responses=8, response=256).prompts == 1


def test_interleaving_keeps_more_of_the_same_layers() -> None:
    """Of P rows' layers, P + (P - 1) / V rows' on the first rank; the tower in its first chunk up to 2 P rows'."""
    row = Row(prompts=1, prompt=64, image=16, responses=4, response=32)
    plain, interleaved = (
        stage_activations(
            SPEC,
            row,
            ParallelDims(pipeline=2, virtual=virtual),
            4,
            stage=0,
            recompute="none",
            recompute_vision=False,
            microbatches=microbatches,
        )
        for virtual, microbatches in ((1, 8), (2, 8))
    )
    assert interleaved["text"] / plain["text"] == pytest.approx((2 + 1 / 2) / 2)
    assert interleaved["vision"] == 2 * plain["vision"]
    assert interleaved["borders"] > plain["borders"] > 0


@pytest.mark.parametrize("virtual", [1, 2])
def test_few_microbatches_keep_less(virtual: int) -> None:
    row = Row(prompts=1, prompt=64, image=16, responses=4, response=32)
    dims = ParallelDims(pipeline=2, virtual=virtual)
    total = [fullest_rank(SPEC, dims, row, Training(), microbatches).total for microbatches in (1, 2, 4, 100)]
    assert total == sorted(total)
    assert total[0] < total[-1] == total[-2] == fullest_rank(SPEC, dims, row, Training()).total


def test_first_stage_keeps_the_most_rows() -> None:
    row = Row(prompts=1, prompt=64, image=16, responses=4, response=32)
    dims = ParallelDims(pipeline=4)
    stages = [
        sum(stage_activations(SPEC, row, dims, 4, stage=n, recompute="none", recompute_vision=False).values())
        for n in range(4)
    ]
    assert stages == sorted(stages, reverse=True)
    assert fullest_rank(SPEC, dims, row, Training()) in [rank_memory(SPEC, dims, row, Training(), n) for n in range(4)]


def test_recompute_keeps_less() -> None:
    spec, dims = SIZES["qwen3-vl-8b"], ParallelDims()
    row = Row(prompts=2, prompt=1024, image=1024, responses=8, response=256)
    memory = [rank_memory(spec, dims, row, Training(recompute=mode), 0) for mode in ("none", "selective", "full")]
    assert memory[0].text > memory[1].text > memory[2].text
    assert rank_memory(spec, dims, row, Training(recompute_vision=True), 0).vision < memory[0].vision
    assert rank_memory(spec, dims, row, Training(colocated=True), 0).rollout == 2 * 8_767_123_696
