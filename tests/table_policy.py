"""A policy without a model: a log-prob and an entropy for each token id, all of them free parameters, in float64.

Its gradient is that of the loss by token, so an update's arithmetic can be looked at by itself, and in milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_vlrl.backends.protocol import OptimizerStep, TokenLoss, TokenReport, TokenScores, UpdateResult
from megatron_vlrl.packing import Microbatch
from megatron_vlrl.parallel.groups import ProcessGroups
from megatron_vlrl.types import RolloutGroup
from tests.groups import make_group
from tests.update_cases import LENGTHS, task_of

TOKENS = sum(map(sum, LENGTHS))


class TablePolicy:
    """What an `Updater` needs of a backend. Token ids are places in the tables; 0 is that of fillers."""

    def __init__(self, log_probs: Tensor, entropies: Tensor, reference: Tensor) -> None:
        """Float64[TOKENS] each."""
        self.groups = ProcessGroups.single()
        self.parameters = [
            torch.cat([torch.tensor([-0.4]).double(), column]).requires_grad_() for column in (log_probs, entropies)
        ]
        self.reference = torch.cat([torch.tensor([-2.0]).double(), reference])
        self.reports: list[TokenReport] = []  # of the last update, by microbatch

    def score(self, microbatches: Sequence[Microbatch], *, reference: bool = False) -> list[TokenScores]:
        """The tables' entries."""
        now, entropies = (parameter.detach() for parameter in self.parameters)
        table = self.reference if reference else now
        return [
            TokenScores(log_probs=table[batch.target_ids], entropies=entropies[batch.target_ids])
            for batch in microbatches
        ]

    def train_step(
        self, microbatches: Sequence[Microbatch], token_loss: TokenLoss, step: OptimizerStep
    ) -> UpdateResult:
        """The loss's gradient by token, and a step by `moved`."""
        total, self.reports = 0.0, []
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        for batch in microbatches:
            loss, report = token_loss(batch, *(parameter[batch.target_ids] for parameter in self.parameters))
            loss.backward()
            total += float(loss.detach())
            self.reports.append(report)
        with torch.no_grad():
            for parameter in self.parameters:
                parameter[1:] -= moved(parameter.grad[1:], step.lr)
        sums = {name: sum(report.sums[name] for report in self.reports).numpy() for name in self.reports[0].sums}
        return UpdateResult(sums=sums | {"loss": total}, maxima={}, grad_norm=0.0, skipped=None)

    def hf_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Of the last update."""
        yield from zip(("log_probs", "entropies"), (parameter.grad for parameter in self.parameters), strict=True)


def moved(gradient: Tensor, lr: float) -> Tensor:
    """What a step takes off a table: a token's gradient moves all others too, as in a model. Float64[TOKENS]."""
    mixing = torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(8)).double()
    return lr * (mixing @ gradient)


def table_columns() -> dict[str, Tensor]:
    """Log-probs of policy, sampler and reference, and entropies of three levels for the tasks: float64[TOKENS]."""
    draw = torch.Generator().manual_seed(4)

    def normal() -> Tensor:
        return torch.randn(TOKENS, generator=draw).double()  # representable in float32, as what a sampler gives is

    now = (-1.5 + 0.5 * normal()).float().double()
    level = torch.cat([torch.full((sum(row),), 2.0 + 0.4 * (number % 3)) for number, row in enumerate(LENGTHS)])
    return {
        "now": now,
        "entropies": level.double() + 0.1 * normal(),
        "rollout": (now + 0.3 * normal()).float().double(),
        "reference": now + 0.4 * normal(),
    }


def table_groups() -> list[RolloutGroup]:
    """The groups of `update_cases` with a token id of its own for each response token, from 1 on."""
    ids = iter(range(1, TOKENS + 1))
    groups = []
    for position, row in enumerate(LENGTHS):
        group = make_group(position, row, task=task_of(position))
        rollouts = [replace(one, token_ids=tuple(next(ids) for _ in one.token_ids)) for one in group.rollouts]
        groups.append(replace(group, rollouts=tuple(rollouts)))
    return groups
