"""The language model's head, log-prob and entropy in one function: hidden rows in, log-probs of tokens out.

The vocabulary is split on the tensor group. Rows are taken a chunk at a time: logits of one chunk are all that exists
at once, in the forward pass and, computed anew, in the backward. One MAX and one SUM all-reduce a chunk give log-prob
and entropy together. d log p = onehot - p, dH = -p (z - E[z]).
U rows with logits, D hidden size, V vocabulary, R response tokens; several tokens may share a row (a group's first).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vlrl.parallel.groups import Group

# Far below any logit, yet finite: 0 * z stays 0 where a banned token's probability is 0.
_BANNED = -1e30
_CHUNK_NUMBERS = 2**26  # logits of a chunk, 256 MiB in float32
_BLOCK_COLUMNS = 4096  # what element-wise work copies at a time


@dataclass(frozen=True, slots=True)
class _Head:
    """What turns hidden rows into scaled logits on this rank."""

    weight: Tensor
    banned: Tensor
    temperatures: Tensor | None  # float32[U]; None: all are 1
    group: Group

    def logits(self, hidden: Tensor, chunk: slice) -> Tensor:
        """float32[c, V/tp] of the sampling distribution for the rows of a chunk, in memory of its own."""
        scaled = (hidden[chunk] @ self.weight.t()).float()
        if self.temperatures is not None:
            scaled.div_(self.temperatures[chunk, None])
        return scaled.index_fill_(1, self.banned, _BANNED)

    def reduce(self, value: Tensor, op: Any) -> None:
        """All-reduce over the tensor group, in place."""
        if self.group.size > 1:
            dist.all_reduce(value, op=op, group=self.group.handle)


def _blocks(scaled: Tensor) -> Iterator[Tensor]:
    yield from scaled.split(_BLOCK_COLUMNS, dim=1)


def _totals(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over this rank's columns of exp(z) and of exp(z) z."""
    total, weighted = torch.zeros(2, len(scaled), device=scaled.device).unbind()
    for block in _blocks(scaled):
        share = block.exp()
        total += share.sum(1)
        weighted += share.mul_(block).sum(1)
    return total, weighted


class _HeadLogProb(torch.autograd.Function):
    """(hidden [U, D], weight [V/tp, D], source [R], target [R]) -> (log_probs [R], entropies [U])."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, source: Tensor, target: Tensor, head: _Head, rows: int
    ) -> tuple[Tensor, Tensor]:
        """`source` ascends: the tokens of a chunk's rows are one run of it."""
        width = len(weight)
        local = target - head.group.rank * width
        mine = (local >= 0) & (local < width)
        local = local.clamp(0, width - 1)
        picked = torch.empty(len(source), device=hidden.device)
        top, total, mean = torch.empty(3, len(hidden), device=hidden.device).unbind()
        for chunk, tokens in _chunks(source, len(hidden), rows):
            scaled = head.logits(hidden, chunk)
            top[chunk] = scaled.amax(1)
            head.reduce(top[chunk], dist.ReduceOp.MAX)
            scaled.sub_(
                top[chunk, None]
            )  # not only for exp: a peaked row's entropy is a small difference of its logits
            own = scaled[source[tokens] - chunk.start, local[tokens]].masked_fill_(~mine[tokens], 0.0)
            sums = torch.cat([*_totals(scaled), own])
            count = len(scaled)
            del scaled  # before the next chunk's
            head.reduce(sums, dist.ReduceOp.SUM)
            total[chunk], picked[tokens] = sums[:count], sums[2 * count :]
            mean[chunk] = sums[count : 2 * count] / sums[:count]
        ctx.save_for_backward(hidden, weight, source, local, mine, top, total, mean)
        ctx.head, ctx.rows = head, rows
        ctx.set_materialize_grads(False)
        log_total = total.log()
        return picked - log_total[source], log_total - mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, source, local, mine, top, total, mean = ctx.saved_tensors
        head: _Head = ctx.head
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        by_token = torch.zeros(len(source), device=hidden.device) if grad_log_probs is None else grad_log_probs
        by_entropy = torch.zeros_like(mean) if grad_entropies is None else grad_entropies
        if head.temperatures is not None:  # gradients of the logits as they are before the division
            by_token, by_entropy = by_token / head.temperatures[source], by_entropy / head.temperatures
        by_row = torch.zeros_like(mean).index_add_(0, source, by_token)
        for chunk, tokens in _chunks(source, len(hidden), ctx.rows):
            scaled = head.logits(hidden, chunk).sub_(top[chunk, None])
            for block in _blocks(scaled):  # becomes the gradient, in place
                prob = block.exp().div_(total[chunk, None])
                if grad_entropies is None:
                    block.copy_(prob).mul_(-by_row[chunk, None])
                else:
                    block.sub_(mean[chunk, None]).mul_(by_entropy[chunk, None]).add_(by_row[chunk, None])
                    block.mul_(prob).neg_()
            places = (source[tokens] - chunk.start, local[tokens])
            scaled.index_put_(places, by_token[tokens].masked_fill(~mine[tokens], 0.0), accumulate=True)
            grad = scaled.to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[chunk])
            grad_weight.addmm_(grad.t(), hidden[chunk])
            del scaled, grad, block, prob  # before the next chunk's
        head.reduce(grad_hidden, dist.ReduceOp.SUM)
        return grad_hidden, grad_weight, None, None, None, None


def _chunks(source: Tensor, count: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """(rows, tokens) of each chunk of `rows` rows; `source` ascends."""
    starts = torch.arange(0, count, rows, device=source.device)
    borders = [*torch.searchsorted(source, starts).tolist(), len(source)]
    for number, start in enumerate(range(0, count, rows)):
        yield slice(start, min(start + rows, count)), slice(borders[number], borders[number + 1])


def head_log_probs(
    hidden: Tensor,
    weight: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    banned: Tensor,
    temperatures: Tensor,
    group: Group,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of the sampling distribution for each response token, both float32[R], in nats.

    hidden: [U, D], whole on every rank of the tensor group; its gradient is summed over the group. weight: [V/tp, D],
    this rank's rows of the head. source: int64[R], row of each token. target: int64[R], global ids. banned: int64 local
    columns that the sampler can't draw. temperatures: float32[U], over 0, divide each row's logits. chunk_rows: rows
    whose logits exist at once; None: as many as fit 256 MiB.
    """
    rows = chunk_rows or max(1, _CHUNK_NUMBERS // len(weight))
    order = torch.argsort(source, stable=True)
    back = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    scales = None if bool((temperatures == 1.0).all()) else temperatures  # dividing by 1 would cost a pass a chunk
    head = _Head(weight.detach(), banned, scales, group)
    log_probs, entropies = _HeadLogProb.apply(hidden, weight, source[order], target[order], head, rows)
    return log_probs[back], entropies[source]
