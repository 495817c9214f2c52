"""Updates of the real backend: every objective and term has the gradient of its formula, however the step is cut.

The measure is float64 autograd of tests/dense.py through transformers on padded rows. The backend too is held in
float64 here, but for its head: so what a cut of the step does can be told from rounding. A few updates are in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_vlrl.backends import build_backend
from megatron_vlrl.backends.protocol import UpdateResult
from megatron_vlrl.config.schema import AlgorithmConfig, OptimizerConfig
from megatron_vlrl.types import RolloutGroup
from tests.dense import sums_of, written_loss
from tests.reference import backend_options, hf_model, make_groups, relative, renderer_and_sampling, scores_of
from tests.spawn import run_ranks
from tests.tiny import make_tiny
from tests.update_cases import (
    ALL,
    CASES,
    DATA_PLANS,
    HALVES,
    IMAGES,
    LENGTHS,
    LONGEST,
    NOISE,
    PLANS,
    TWICE,
    Taken,
    check_sums,
    computed_of,
    flat,
    mean_by_task,
    responses_of,
    take,
    task_of,
    with_bands,
    with_sampler,
)

pytestmark = pytest.mark.slow

LR = 0.02  # of the steps of two updates: the second is clearly off policy then
# Greatest relative errors of the global gradient, and of the parameter that is off most.
HEAD = (2e-6, 4e-6)  # from the formulas in float64: the head's logits and the loss are in float32
CUT = (1e-7, 2e-7)  # from one process in float64: a token's log-prob may be rounded otherwise
SPLIT_HEAD = (1e-6, 2e-6)  # the same where tensor ranks share the head, whose sums are in float32
FLOAT32 = (5e-6, 2e-5)  # from the formulas, all in float32


@dataclass(frozen=True)
class Expected:
    """One update by its formulas: the value of the loss, gradients by Hugging Face name, and what it reports."""

    value: float
    gradients: Mapping[str, Tensor]
    sums: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Job:
    """What is done: a step of one update without a learning rate, or of two with one."""

    case: str
    plan: str = "one microbatch"
    twice: bool = False


@dataclass(frozen=True)
class Step:
    """Groups with their sampler's log-probs, the cases with their bands, and what each must give, by (case, twice)."""

    groups: Sequence[RolloutGroup]
    cases: Mapping[str, AlgorithmConfig]
    expected: Mapping[tuple[str, bool], Sequence[Expected]]


@dataclass(frozen=True)
class Compared:
    """An update and what it must report: by the formulas, and as one process reported it; of its gradients the errors,
    of all together relative to their norm, and of the parameter that is off most."""

    job: Job
    update: UpdateResult
    microbatches: int
    expected: Expected  # without gradients
    norm: float  # of the expected gradients
    alone: UpdateResult
    error: tuple[float, float]  # from the formulas
    alone_error: tuple[float, float]  # from one process


# ---------------------------------------------------------------------- by the formulas


def make_models(folder: Path) -> None:
    """A policy, and a reference that is some way off."""
    for name, seed in (("policy", 0), ("reference", 1)):
        make_tiny(folder / name, layers=2, seed=seed)
    policy, other = (load_file(folder / name / "model.safetensors") for name in ("policy", "reference"))
    mixed = {name: 0.95 * weight + 0.05 * other[name] for name, weight in policy.items()}
    save_file(mixed, folder / "reference" / "model.safetensors", metadata={"format": "pt"})


def write_step(folder: Path) -> None:
    """Models and the `Step`."""
    make_models(folder)
    renderer, sampling = renderer_and_sampling(folder / "policy")
    groups = make_groups(renderer, IMAGES, LENGTHS, [task_of(position) for position in ALL])
    model = hf_model(folder / "policy")
    now, entropies = scores_of(model, groups, sampling)
    noise = torch.randn(now.shape, generator=torch.Generator().manual_seed(9))
    columns = {"rollout": (now.detach() + NOISE * noise).float().double(), "start": now.detach()}
    with torch.no_grad():
        columns["reference"], _ = scores_of(hf_model(folder / "reference"), groups, sampling)
    measured = {"nll": mean_by_task(-now), "full": mean_by_task(entropies)}
    cases = {name: with_bands(case, measured) for name, case in CASES.items()}

    first = {**columns, "now": now, "entropies": entropies}
    expected = {(name, False): [by_formula(case, first, model)] for name, case in cases.items()}
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name in TWICE:
        updates = []
        for half in HALVES:
            now, entropies = scores_of(model, groups, sampling)
            updates.append(by_formula(cases[name], {**columns, "now": now, "entropies": entropies}, model, half))
            move(model, updates[-1].gradients)
        expected[name, True] = updates
        model.load_state_dict(weights, strict=False)
    torch.save(Step(with_sampler(groups, columns["rollout"]), cases, expected), folder / "step.pt")


def by_formula(
    case: AlgorithmConfig, columns: Mapping[str, Tensor], model: torch.nn.Module, positions: Sequence[int] = ALL
) -> Expected:
    """The update of the groups at `positions`; the graph of `columns` is kept."""
    written = written_loss(case, responses_of(columns, positions), LONGEST)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(
        written.loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    computed = responses_of(columns, computed_of(case, positions))
    return Expected(
        value=written.value,
        gradients=dict(zip(names, gradients, strict=True)),
        sums=sums_of(case, computed, written.sides),
    )


def move(model: torch.nn.Module, gradients: Mapping[str, Tensor]) -> None:
    """AdamW without memory, which takes gradient / (|gradient| + epsilon), and an epsilon of 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.sub_(LR * gradients[name] / (gradients[name].abs() + 1.0))


# ---------------------------------------------------------------------- by the trainer


@contextmanager
def gradients_as_weights() -> Iterator[None]:
    """Gradients are summed in the type of their weights, where a run always sums them in float32."""
    from megatron_vlrl.backends.megatron import backend

    def ddp_config(**options: bool) -> Any:
        return replace(given(**options), grad_reduce_in_fp32=False)

    given = backend.ddp_config
    with mock.patch.object(backend, "ddp_config", ddp_config):
        yield


def compared(
    folder: Path, parallel: Mapping[str, int], jobs: Sequence[Job], dtype: str = "float64"
) -> dict[Job, list[Compared]]:
    """All jobs on one backend. The first process to come here leaves its updates for the others to compare with."""
    step: Step = torch.load(folder / "step.pt", weights_only=False)
    _, sampling = renderer_and_sampling(folder / "policy")
    options = backend_options(folder / "reference", sampling, **parallel)
    options = replace(
        options,
        model=replace(options.model, dtype=dtype),
        optimizer=OptimizerConfig(betas=(0.0, 0.0), eps=1.0),
    )
    with gradients_as_weights():
        backend = build_backend(options)
    backend.keep_reference(moving=False)
    backend.load_hf(folder / "policy")
    taken = {}
    for job in jobs:
        plan = (PLANS | DATA_PLANS)[job.plan]
        halves, lr = (HALVES, LR) if job.twice else ((ALL,), 0.0)
        taken[job] = take(backend, step.groups, step.cases[job.case], plan, minibatches=halves, lr=lr)
        if job.twice:
            backend.load_hf(folder / "policy")
    backend.close()
    if not (folder / "alone.pt").exists():
        torch.save({(job.case, job.twice): taken[job] for job in JOBS}, folder / "alone.pt")
    alone: dict[tuple[str, bool], list[Taken]] = torch.load(folder / "alone.pt", weights_only=False)
    return {
        job: [
            held_against(job, *triple)
            for triple in zip(updates, step.expected[job.case, job.twice], alone[job.case, job.twice], strict=True)
        ]
        for job, updates in taken.items()
    }


def held_against(job: Job, one: Taken, expected: Expected, alone: Taken) -> Compared:
    return Compared(
        job=job,
        update=one.update,
        microbatches=one.microbatches,
        expected=replace(expected, gradients={}),
        norm=float(flat(expected.gradients).norm()),
        alone=alone.update,
        error=errors(one.gradients, expected.gradients),
        alone_error=errors(one.gradients, alone.gradients),
    )


def errors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, float]:
    """As in `Compared`. A gradient that is nothing but rounding is held to the size of the others."""
    assert set(got) == set(expected)
    typical = max(float(gradient.norm()) for gradient in expected.values())
    worst = max(
        float((got[name] - gradient).norm() / gradient.norm().clamp_min(1e-3 * typical))
        for name, gradient in expected.items()
    )
    return relative(flat(got), flat(expected)), worst


JOBS = (*(Job(name) for name in CASES), *(Job(name, twice=True) for name in TWICE))
OTHER_CUTS = [Job(name, plan) for plan in ("many microbatches", "groups of one") for name in CASES]
UNIFORM_TOO = [Job(name, "uniform groups computed") for name in ("ppo_clip", "clip_higher", "dual_clip")]
BY_DATA = [replace(job, plan="four microbatches each") for job in JOBS]
IDLE = [Job(name, "a rank without groups") for name in TWICE]


def in_one_process(folder: Path) -> tuple[dict[Job, list[Compared]], dict[Job, list[Compared]]]:
    """In float64 and in float32, once the step is written."""
    write_step(folder)
    return compared(folder, {}, [*JOBS, *OTHER_CUTS, *UNIFORM_TOO]), compared(folder, {}, JOBS, "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("update")


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[dict[Job, list[Compared]], dict[Job, list[Compared]]]:
    """What `in_one_process` returns."""
    return run_ranks(in_one_process, 1, folder, timeout=300.0)[0]


# ---------------------------------------------------------------------- tests


def within(error: tuple[float, float], limit: tuple[float, float]) -> bool:
    return all(one < greatest for one, greatest in zip(error, limit, strict=True))


def check_formulas(one: Compared, limit: tuple[float, float]) -> None:
    assert within(one.error, limit), f"{one.job}: {one.error}"
    assert one.update.grad_norm == pytest.approx(one.norm, rel=limit[0])
    assert one.update.sums["loss"] == pytest.approx(one.expected.value, rel=limit[0], abs=limit[0])
    check_sums(one.update, one.expected.sums, limit[1])


def check_alone(one: Compared, limit: tuple[float, float]) -> None:
    """It has the gradient of the same update in one process and reports the same."""
    assert within(one.alone_error, limit), f"{one.job}: {one.alone_error}"
    assert set(one.update.sums) == set(one.alone.sums)
    for name, value in one.alone.sums.items():
        if name not in ("ratios", "mismatches"):  # a token at a bin's edge may fall on either side
            np.testing.assert_allclose(one.update.sums[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
        assert one.update.sums[name].sum() == pytest.approx(value.sum(), rel=1e-6, abs=1e-6)
    assert one.update.maxima == pytest.approx(one.alone.maxima, rel=1e-6)
    assert one.update.grad_norm == pytest.approx(one.alone.grad_norm, rel=1e-6)


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_the_update_has_the_gradient_of_the_formulas(alone: Any, job: Job) -> None:
    for updates, limit in zip(alone, (HEAD, FLOAT32), strict=True):
        for one in updates[job]:
            assert one.microbatches == 1
            check_formulas(one, limit)
    sums = alone[0][job][-1].update.sums
    if job.twice:
        assert 0 < sums["clip_fraction"].sum() < sums["tokens"].sum()


@pytest.mark.parametrize("plan", ["many microbatches", "groups of one"])
def test_microbatches_and_packing_change_nothing(alone: Any, plan: str) -> None:
    for name in CASES:
        (one,) = alone[0][Job(name, plan)]
        assert one.microbatches == (1 if plan == "groups of one" else len(computed_of(CASES[name])))
        check_alone(one, CUT)


def test_uniform_groups_change_nothing_when_they_are_computed(alone: Any) -> None:
    for job in UNIFORM_TOO:
        (one,) = alone[0][job]
        assert within(one.alone_error, CUT)
        assert one.update.sums["tokens"].sum() == sum(map(sum, LENGTHS)) > one.alone.sums["tokens"].sum()


@pytest.mark.usefixtures("alone")
def test_two_data_ranks_of_four_microbatches_change_nothing(folder: Path) -> None:
    for rank in run_ranks(compared, 2, folder, {"data": 2}, [*BY_DATA, *IDLE]):
        for job, updates in rank.items():
            for one in updates:
                check_alone(one, CUT)
            if job in BY_DATA and not job.twice:
                assert updates[0].microbatches == (4 if len(computed_of(CASES[job.case])) == 8 else 5)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("parallel", "limit"), [({"tensor": 2}, SPLIT_HEAD), ({"pipeline": 2}, CUT)], ids=str)
def test_tensor_and_pipeline_ranks_change_nothing(
    folder: Path, parallel: dict[str, int], limit: tuple[float, float]
) -> None:
    for rank in run_ranks(compared, 2, folder, parallel, JOBS):
        for updates in rank.values():
            for one in updates:
                check_alone(one, limit)


@pytest.mark.usefixtures("alone")
def test_two_data_ranks_of_four_microbatches_in_float32(folder: Path) -> None:
    for rank in run_ranks(compared, 2, folder, {"data": 2}, BY_DATA, "float32"):
        for updates in rank.values():
            for one in updates:
                check_formulas(one, FLOAT32)
