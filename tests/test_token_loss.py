"""The loss of an update by token, against its written formulas in float64: every objective and term, however it is cut.

The policy is a table, so that gradients are exact; those of the model are in tests/test_update.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_vlrl.config.schema import AlgorithmConfig, EntropyConfig
from megatron_vlrl.packing import packed_tokens
from megatron_vlrl.parallel.groups import Group
from megatron_vlrl.train.minibatches import filler
from megatron_vlrl.train.update import Updater
from tests import update_cases
from tests.dense import Written, sums_of, written_loss
from tests.reference import at_rate, relative
from tests.table_policy import TablePolicy, moved, table_columns, table_groups
from tests.update_cases import (
    ALL,
    CASES,
    HALVES,
    LENGTHS,
    LONGEST,
    PLANS,
    TASKS,
    TWICE,
    UNIFORM,
    Taken,
    check_sums,
    computed_of,
    flat,
    mean_by_task,
    members_of,
    responses_of,
    take,
    with_bands,
    with_sampler,
)

LR = 3.0  # of a step of two updates, the second of which is clearly off policy then
ROUNDING = 2e-7  # advantages and weights are float32


def case_of(name: str) -> AlgorithmConfig:
    columns = table_columns()
    measured = {"nll": mean_by_task(-columns["now"]), "full": mean_by_task(columns["entropies"])}
    return with_bands(CASES[name], measured)


def policy() -> TablePolicy:
    columns = table_columns()
    return TablePolicy(columns["now"], columns["entropies"], columns["reference"])


def taken(name: str, plan: str = "one microbatch", minibatches: Sequence[Sequence[int]] = (ALL,)) -> list[Taken]:
    groups = with_sampler(table_groups(), table_columns()["rollout"])
    return take(policy(), groups, case_of(name), PLANS[plan], minibatches=minibatches, lr=LR)


@dataclass(frozen=True)
class Expected:
    """An update by its formulas, its gradient on the tables, log-probs first, and what it reports."""

    written: Written
    gradient: Tensor
    sums: dict[str, dict[str, float]]


def expected(name: str, minibatches: Sequence[Sequence[int]] = (ALL,)) -> list[Expected]:
    columns, case = table_columns(), case_of(name)
    tables = {key: columns[key].clone().requires_grad_() for key in ("now", "entropies")}
    updates = []
    for positions in minibatches:
        everything = {**columns, **tables, "start": columns["now"]}
        written = written_loss(case, responses_of(everything, positions), LONGEST)
        sums = sums_of(case, responses_of(everything, computed_of(case, positions)), written.sides)
        gradients = torch.autograd.grad(written.loss, list(tables.values()), materialize_grads=True, allow_unused=True)
        updates.append(Expected(written, torch.cat(gradients), sums))
        with torch.no_grad():
            for table, gradient in zip(tables.values(), gradients, strict=True):
                table.sub_(moved(gradient, LR))
    return updates


def gradient_of(one: Taken) -> Tensor:
    """Of the tokens, without the fillers'."""
    assert not any(gradient[0] for gradient in one.gradients.values())
    return torch.cat([one.gradients[name][1:] for name in ("log_probs", "entropies")])


def check(one: Taken, wanted: Expected) -> None:
    assert one.update.sums["loss"] == pytest.approx(wanted.written.value, rel=ROUNDING, abs=ROUNDING)
    assert relative(gradient_of(one), wanted.gradient) < ROUNDING
    check_sums(one.update, wanted.sums, ROUNDING)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_the_formulas(name: str) -> None:
    (wanted,) = expected(name)
    for plan in ("one microbatch", "many microbatches", "groups of one"):
        (one,) = taken(name, plan)
        check(one, wanted)


@pytest.mark.parametrize("name", TWICE)
def test_the_second_update_is_off_policy_from_the_steps_start(name: str) -> None:
    """Its ratios are to the log-probs before the first, its importance is of these, and its entropy of now."""
    wanted = expected(name, HALVES)
    for plan in ("one microbatch", "many microbatches"):
        updates = taken(name, plan, HALVES)
        for one, other in zip(updates, wanted, strict=True):
            check(one, other)
    sums = updates[1].update.sums
    assert 0 < sums["clip_fraction"].sum() < sums["tokens"].sum()
    if name == "all terms":  # the first update moved a task out of its band
        assert [one.written.sides["inside"] for one in wanted] == [0, -1]


@pytest.mark.parametrize("name", CASES)
def test_every_case_reaches_what_it_is_about(name: str) -> None:
    """Else a formula could be left out and nothing would show."""
    case = case_of(name)
    (one,) = taken(name)
    sums = one.update.sums
    tokens = sums["tokens"].sum()
    for mark in ("clip_fraction", "dual_clip_fraction"):
        if mark in sums and case.loss.importance == "none":
            assert 0 < sums[mark].sum() < tokens
    if case.loss.importance != "none":
        assert 0.3 * tokens < sums["importance"].sum() != tokens
    if case.entropy.coefficient:
        assert (sums["entropy_side"][:3] / sums["tokens"][:3]).tolist() == [1.0, 0.0, -1.0]
    computed = len(computed_of(case))
    assert computed == len(LENGTHS) - (0 if case.kl.reference != "none" or case.entropy.coefficient else len(UNIFORM))
    assert taken(name, "many microbatches")[0].microbatches == computed


@pytest.mark.parametrize("name", [name for name in CASES if len(computed_of(CASES[name])) < len(LENGTHS)])
def test_uniform_groups_are_in_the_means_whether_they_are_computed_or_not(name: str) -> None:
    (without,), (with_them,) = taken(name), taken(name, "uniform groups computed")
    assert torch.equal(gradient_of(with_them), gradient_of(without))
    more = with_them.update.sums["tokens"].sum() - without.update.sums["tokens"].sum()
    assert more == sum(sum(LENGTHS[position]) for position in UNIFORM)


@pytest.mark.parametrize("name", CASES)
def test_a_filler_changes_nothing(name: str) -> None:
    """Whether it shares a row with groups, has a row of its own, or is all that a rank has."""
    case, groups = case_of(name), with_sampler(table_groups(), table_columns()["rollout"])
    (members,) = members_of(groups, case, PLANS["one microbatch"], Group.single(), (ALL,))
    (without,) = taken(name)
    for tokens in (1, 10**6):
        backend = policy()
        updater = Updater(backend=backend, task_names=TASKS, microbatch_tokens=tokens, cost=packed_tokens)
        (batches,) = updater.prepare([[filler(), *members, filler()]], case, version=0)
        update = updater.update(batches, case, at_rate(0.0))
        one = Taken(update=update, microbatches=0, gradients=dict(backend.hf_gradients()))
        torch.testing.assert_close(gradient_of(one), gradient_of(without), rtol=1e-12, atol=1e-12)
        for key, value in without.update.sums.items():
            np.testing.assert_allclose(update.sums[key], value, rtol=1e-12, err_msg=key)

    backend = policy()
    updater = Updater(backend=backend, task_names=TASKS, microbatch_tokens=1, cost=packed_tokens)
    (batches,) = updater.prepare([[]], case, version=0)
    update = updater.update(batches, case, at_rate(1.0))
    assert not any(np.any(value) for value in update.sums.values())
    assert not any(gradient.any() for _, gradient in backend.hf_gradients())


@pytest.mark.parametrize("name", ["nll", "score", "all terms"])
def test_a_task_without_responses_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = taken(name)
    monkeypatch.setattr(update_cases, "TASKS", TASKS[:3])
    (without,) = taken(name)
    assert torch.equal(flat(one.gradients), flat(without.gradients))
    for key, value in without.update.sums.items():
        assert np.array_equal(one.update.sums[key][:3] if key != "loss" else one.update.sums[key], value), key
        assert np.isfinite(one.update.sums[key]).all()


@pytest.mark.parametrize("name", ["full", "nll", "score", "all terms"])
def test_a_task_inside_its_band_is_not_shaped(name: str) -> None:
    """The hinges' subgradient is 0 there and of one sign on either side."""
    (one,) = taken(name)
    case = case_of(name)
    (plain,) = take(
        policy(),
        with_sampler(table_groups(), table_columns()["rollout"]),
        replace(case, entropy=EntropyConfig()),
    )
    share = gradient_of(one) - gradient_of(plain)
    by_task = [torch.cat(share.view(2, -1).split([sum(row) for row in LENGTHS], dim=1)[n::3], dim=1) for n in range(3)]
    assert not by_task[1].any()
    if case.entropy.estimator == "full":
        counts = [part.shape[1] for part in by_task]
        for part, count, sign in ((by_task[0], counts[0], 1), (by_task[2], counts[2], -1)):
            assert not part[0].any()
            torch.testing.assert_close(part[1], torch.full_like(part[1], sign * case.entropy.coefficient / count))
