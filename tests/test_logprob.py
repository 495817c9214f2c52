"""Log-prob and entropy over a split vocabulary equal a dense softmax in float64, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlrl.parallel.groups import Group
from megatron_vlrl.parallel.logprob import log_probs_and_entropies
from tests.spawn import run_ranks

VOCABULARY = 24
# Rows 0 and 2 serve several tokens, two of them the same token; row 4 serves none.
SOURCE = torch.tensor([0, 0, 0, 1, 2, 2, 3])
TARGET = torch.tensor([3, 3, 17, 0, 23, 11, 12])
# temperature, banned ids, and the lowest target
CASES = {
    "plain": (1.0, (), 0),
    "temperature": (0.7, (), 0),
    "banned": (1.3, (1, 10, 13, 22), 0),
    "a shard without banned ids": (0.5, (20, 21), 0),
    "a whole shard banned": (1.0, tuple(range(12)), 12),
}


def logits_of(scale: float = 3.0) -> Tensor:
    return scale * torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(1))


def loss_of(log_probs: Tensor, entropies: Tensor, part: str) -> Tensor:
    weights = torch.linspace(-1, 2, len(log_probs), dtype=log_probs.dtype)
    return {
        "both": (weights * log_probs).sum() + (weights.flip(0) * entropies).sum(),
        "log-probs": (weights * log_probs).sum(),
        "entropies": (weights * entropies).sum(),
    }[part]


def dense(
    logits: Tensor, target: Tensor, temperature: float, banned: tuple[int, ...], part: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, entropies, gradient) by autograd in float64; banned columns are taken out altogether."""
    leaf = logits.double().requires_grad_()
    kept = torch.tensor([column for column in range(VOCABULARY) if column not in banned])
    scores = (leaf[:, kept] / temperature).log_softmax(-1)
    place = torch.full((VOCABULARY,), -1).index_copy(0, kept, torch.arange(len(kept)))
    log_probs = scores[SOURCE, place[target]]
    entropies = -(scores.exp() * scores).sum(-1)[SOURCE]
    loss_of(log_probs, entropies, part).backward()
    assert leaf.grad is not None
    return log_probs.detach(), entropies.detach(), leaf.grad


def errors(group: Group) -> dict[tuple[str, str], list[float]]:
    """Greatest errors of log-probs, entropies and gradients on this rank's slice of the vocabulary.

    Relative to the greatest value where that is over 1.
    """
    width = VOCABULARY // group.size
    begin = group.rank * width
    result = {}
    for name, (temperature, banned, lowest) in CASES.items():
        target = TARGET.clamp(min=lowest)
        for part in ("both", "log-probs", "entropies"):
            mine = logits_of()[:, begin : begin + width].clone().requires_grad_()
            before = mine.detach().clone()
            local = torch.tensor([i - begin for i in banned if begin <= i < begin + width], dtype=torch.int64)
            log_probs, entropies = log_probs_and_entropies(
                mine, SOURCE, target, banned=local, temperature=temperature, group=group
            )
            loss_of(log_probs, entropies, part).backward()
            assert torch.equal(mine, before), "the input was written to"
            expected = dense(logits_of(), target, temperature, banned, part)
            got = (log_probs, entropies, mine.grad)
            wanted = (expected[0], expected[1], expected[2][:, begin : begin + width])
            result[name, part] = [
                float((a.detach() - b).abs().max() / b.abs().max().clamp_min(1.0))
                for a, b in zip(got, wanted, strict=True)
            ]
    return result


def errors_on_world() -> dict[tuple[str, str], list[float]]:
    return errors(Group(dist.get_rank(), dist.get_world_size(), dist.group.WORLD))


@pytest.mark.parametrize("world", [1, 2])
def test_equal_to_a_dense_softmax(world: int) -> None:
    for rank in [errors(Group.single())] if world == 1 else run_ranks(errors_on_world, world):
        for case, values in rank.items():
            assert max(values) < 3e-6, (case, values)


def test_a_logit_far_above_the_rest_stays_finite() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-3e4, -3e4, -3e4]], requires_grad=True)
    log_probs, entropies = log_probs_and_entropies(
        logits,
        torch.tensor([0, 0, 1]),
        torch.tensor([0, 1, 2]),
        banned=torch.tensor([], dtype=torch.int64),
        temperature=1.0,
        group=Group.single(),
    )
    torch.testing.assert_close(log_probs, torch.tensor([0.0, -1e4, -math.log(3)]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropies, torch.tensor([0.0, 0.0, math.log(3)]), rtol=1e-6, atol=1e-6)
    (log_probs.sum() + entropies.sum()).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_half_precision_logits_are_scored_in_single_precision() -> None:
    logits = logits_of().bfloat16().requires_grad_()
    none = torch.tensor([], dtype=torch.int64)
    log_probs, entropies = log_probs_and_entropies(
        logits, SOURCE, TARGET, banned=none, temperature=1.0, group=Group.single()
    )
    expected = dense(logits.detach(), TARGET, 1.0, (), "both")
    assert log_probs.dtype == entropies.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), expected[0], rtol=0, atol=5e-6)
    loss_of(log_probs, entropies, "both").backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), expected[2], rtol=1e-2, atol=1e-3)
