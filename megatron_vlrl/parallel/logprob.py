"""Log-prob and entropy over a vocabulary that is split on the tensor group, in one pass over the logits.

One MAX and one SUM all-reduce give both. The input is left as it was. d log p = onehot - p, dH = -p (z - E[z]).
U rows with logits, V vocabulary, R response tokens; several tokens may share a row (the first tokens of a group).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vlrl.parallel.groups import Group

# Far below any logit, yet finite: 0 * z stays 0 where a banned token's probability is 0.
_BANNED = -1e30


class _LogProbEntropy(torch.autograd.Function):
    """(logits [U, V/tp], source [R], target [R]) -> (log_probs [R], entropies [U])."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, source: Tensor, target: Tensor, banned: Tensor, temperature: float, group: Group
    ) -> tuple[Tensor, Tensor]:
        scaled = logits.float() / temperature
        scaled.index_fill_(1, banned, _BANNED)
        width = scaled.size(1)
        local = target - group.rank * width
        mine = (local >= 0) & (local < width)
        local = local.clamp(0, width - 1)
        top = scaled.amax(dim=1)
        _all_reduce(top, dist.ReduceOp.MAX, group)
        scaled.sub_(top[:, None])  # not only for exp: a peaked row's entropy is a small difference of its logits
        probs = scaled.exp()
        picked = torch.where(mine, scaled[source, local], 0.0)
        sums = torch.cat([probs.sum(1), (probs * scaled).sum(1), picked])
        _all_reduce(sums, dist.ReduceOp.SUM, group)
        total, weighted, picked = sums.split([len(top), len(top), len(target)])
        probs.div_(total[:, None])
        mean = weighted / total
        log_total = total.log()
        ctx.save_for_backward(probs, scaled, mean, source, local, mine)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.set_materialize_grads(False)
        return picked - log_total[source], log_total - mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        probs, scaled, mean, source, local, mine = ctx.saved_tensors
        grad = torch.zeros_like(probs)
        if grad_log_probs is not None:
            row_grad = torch.zeros_like(mean).index_add_(0, source, grad_log_probs)
            grad.addcmul_(probs, row_grad[:, None], value=-1)
            grad.index_put_((source, local), torch.where(mine, grad_log_probs, 0.0), accumulate=True)
        if grad_entropies is not None:
            grad -= probs * (scaled - mean[:, None]) * grad_entropies[:, None]
        return (grad / ctx.temperature).to(ctx.dtype), None, None, None, None, None


def _all_reduce(value: Tensor, op: Any, group: Group) -> None:
    if group.size > 1:
        dist.all_reduce(value, op=op, group=group.handle)


def log_probs_and_entropies(
    logits: Tensor, source: Tensor, target: Tensor, *, banned: Tensor, temperature: float, group: Group
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of the sampling distribution for each response token, both float32[R], in nats.

    logits: [U, V/tp], this rank's slice of the vocabulary. source: int64[R], row of each token. target: int64[R],
    global ids. banned: int64 local columns that the sampler can't draw. temperature divides the logits.
    """
    log_probs, entropies = _LogProbEntropy.apply(logits, source, target, banned, temperature, group)
    return log_probs, entropies[source]
