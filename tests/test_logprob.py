"""Head, log-prob and entropy over a split vocabulary: values and gradients of a dense softmax, memory of a chunk."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_vlrl.parallel.groups import Group
from megatron_vlrl.parallel.logprob import head_log_probs
from tests.spawn import run_ranks

VOCABULARY, WIDTH, ROWS = 24, 6, 5
# Rows 0 and 2 serve several tokens, two of them the same token; row 4 serves none. Not in order, as in a packed row.
SOURCE = torch.tensor([0, 1, 0, 2, 2, 0, 3])
TARGET = torch.tensor([3, 0, 17, 23, 11, 3, 12])
NONE = torch.tensor([], dtype=torch.int64)
ONES = torch.ones(ROWS)
# temperatures of the rows, banned ids, and the lowest target
CASES = {
    "plain": (ONES, (), 0),
    "temperature": (0.7 * ONES, (), 0),
    "temperatures": (torch.tensor([0.4, 1.0, 2.5, 0.9, 1.0]), (), 0),
    "banned": (1.3 * ONES, (1, 10, 13, 22), 0),
    "a shard without banned ids": (torch.tensor([0.5, 1.0, 0.5, 3.0, 0.1]), (20, 21), 0),
    "a whole shard banned": (ONES, tuple(range(12)), 12),
}


def inputs() -> tuple[Tensor, Tensor]:
    """hidden [U, D] and the whole head [V, D]; logits of about 3."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    return hidden, 1.3 * torch.randn(VOCABULARY, WIDTH, generator=generator)


def loss_of(log_probs: Tensor, entropies: Tensor, part: str) -> Tensor:
    weights = torch.linspace(-1, 2, len(log_probs), dtype=log_probs.dtype)
    return {
        "both": (weights * log_probs).sum() + (weights.flip(0) * entropies).sum(),
        "log-probs": (weights * log_probs).sum(),
        "entropies": (weights * entropies).sum(),
    }[part]


def dense(target: Tensor, temperatures: Tensor, banned: tuple[int, ...], part: str) -> tuple[Tensor, ...]:
    """(log-probs, entropies, gradients of hidden and head) by autograd in float64; banned columns are taken out."""
    hidden, weight = (tensor.double().requires_grad_() for tensor in inputs())
    kept = torch.tensor([column for column in range(VOCABULARY) if column not in banned])
    scores = ((hidden @ weight.t())[:, kept] / temperatures[:, None]).log_softmax(-1)
    place = torch.full((VOCABULARY,), -1).index_copy(0, kept, torch.arange(len(kept)))
    log_probs = scores[SOURCE, place[target]]
    entropies = -(scores.exp() * scores).sum(-1)[SOURCE]
    loss_of(log_probs, entropies, part).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return log_probs.detach(), entropies.detach(), hidden.grad, weight.grad


def errors(group: Group, chunk_rows: int | None) -> dict[tuple[str, str], list[float]]:
    """Greatest errors of log-probs, entropies and gradients on this rank's slice of the vocabulary.

    Relative to the greatest value where that is over 1.
    """
    rows = VOCABULARY // group.size
    begin = group.rank * rows
    result = {}
    for name, (temperatures, banned, lowest) in CASES.items():
        target = TARGET.clamp(min=lowest)
        for part in ("both", "log-probs", "entropies"):
            hidden, whole = inputs()
            hidden.requires_grad_()
            weight = whole[begin : begin + rows].clone().requires_grad_()
            local = torch.tensor([i - begin for i in banned if begin <= i < begin + rows], dtype=torch.int64)
            log_probs, entropies = head_log_probs(
                hidden,
                weight,
                SOURCE,
                target,
                banned=local,
                temperatures=temperatures,
                group=group,
                chunk_rows=chunk_rows,
            )
            loss_of(log_probs, entropies, part).backward()
            wanted = dense(target, temperatures, banned, part)
            got = (log_probs.detach(), entropies.detach(), hidden.grad, weight.grad)
            expected = (*wanted[:3], wanted[3][begin : begin + rows])
            result[name, part] = [
                float((a - b).abs().max() / b.abs().max().clamp_min(1.0)) for a, b in zip(got, expected, strict=True)
            ]
    return result


def errors_on_world(chunk_rows: int | None) -> dict[tuple[str, str], list[float]]:
    return errors(Group(dist.get_rank(), dist.get_world_size(), dist.group.WORLD), chunk_rows)


@pytest.mark.parametrize(("world", "chunk_rows"), [(1, None), (1, 1), (1, 2), (2, None), (2, 2)])
def test_equal_to_a_dense_softmax(world: int, chunk_rows: int | None) -> None:
    single = [errors(Group.single(), chunk_rows)]
    for rank in single if world == 1 else run_ranks(errors_on_world, world, chunk_rows):
        for case, values in rank.items():
            assert max(values) < 3e-6, (case, values)


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vlrl.parallel.logprob._BLOCK_COLUMNS", 5)
    assert max(max(values) for values in errors(Group.single(), 2).values()) < 3e-6


def test_a_logit_far_above_the_rest_stays_finite() -> None:
    weight = torch.tensor([[1e4, -3e4], [0.0, -3e4], [-1e4, -3e4]], requires_grad=True)
    log_probs, entropies = head_log_probs(
        torch.eye(2, requires_grad=True),
        weight,
        torch.tensor([0, 0, 1]),
        torch.tensor([0, 1, 2]),
        banned=NONE,
        temperatures=torch.ones(2),
        group=Group.single(),
    )
    torch.testing.assert_close(log_probs, torch.tensor([0.0, -1e4, -math.log(3)]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropies, torch.tensor([0.0, 0.0, math.log(3)]), rtol=1e-6, atol=1e-6)
    (log_probs.sum() + entropies.sum()).backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_half_precision_is_scored_in_single_precision() -> None:
    hidden, weight = (tensor.bfloat16().requires_grad_() for tensor in inputs())
    log_probs, entropies = head_log_probs(
        hidden, weight, SOURCE, TARGET, banned=NONE, temperatures=ONES, group=Group.single()
    )
    logits = (hidden.detach() @ weight.detach().t()).float()
    assert log_probs.dtype == entropies.dtype == torch.float32
    torch.testing.assert_close(log_probs, logits.log_softmax(-1)[SOURCE, TARGET], rtol=0, atol=5e-6)
    loss_of(log_probs, entropies, "both").backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    wanted = dense(TARGET, ONES, (), "both")
    torch.testing.assert_close(hidden.grad.double(), wanted[2], rtol=5e-2, atol=5e-2)


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors made inside the block that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._seen.add(tensor.untyped_storage()._cdata)  # there before: a view of it is nothing new
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("entropy", [False, True], ids=["log-probs", "with entropy"])
def test_memory_is_that_of_one_chunk(entropy: bool) -> None:
    """At Qwen3's vocabulary: beyond gradients of the inputs, at most the float32 logits of one chunk and a tenth."""
    vocabulary, width, rows, chunk = 151_936, 16, 48, 8
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    source, target = torch.arange(rows), torch.randint(0, vocabulary, (rows,), generator=generator)
    temperatures = torch.linspace(0.7, 1.3, rows)
    with LiveBytes() as live:
        log_probs, entropies = head_log_probs(
            hidden,
            weight,
            source,
            target,
            banned=NONE,
            temperatures=temperatures,
            group=Group.single(),
            chunk_rows=chunk,
        )
        forward = live.peak
        live.peak = live.now
        (log_probs.sum() + (entropies.sum() if entropy else 0.0)).backward()
        backward = live.peak
    logits = 4 * chunk * vocabulary
    gradients = 4 * (weight.numel() + hidden.numel())
    print(f"peak: forward {forward / logits:.3f}, backward {(backward - gradients) / logits:.3f} of a chunk's logits")
    assert forward <= 1.1 * logits
    assert backward - gradients <= 1.1 * logits
