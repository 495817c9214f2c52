"""A minibatch of groups -> one optimizer update, and what it measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_vlrl.algorithms.losses import LOSSES
from megatron_vlrl.algorithms.shaping import entropy_sides, entropy_weights
from megatron_vlrl.backends.protocol import Backend, OptimizerStep, TokenReport, UpdateResult
from megatron_vlrl.config.names import resolve_name
from megatron_vlrl.config.schema import AlgorithmConfig
from megatron_vlrl.packing import Microbatch, Targets, cut, pack, packed_tokens
from megatron_vlrl.parallel.collectives import sum_over
from megatron_vlrl.train.minibatches import TrainGroup, filler
from megatron_vlrl.types import RolloutGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Updater:
    """Takes updates on a backend. cost: of a group, in any unit; microbatches are cut to cost alike."""

    backend: Backend
    algorithm: AlgorithmConfig
    task_names: tuple[str, ...]
    microbatch_tokens: int
    cost: Callable[[RolloutGroup], float]

    def pack(self, groups: Sequence[TrainGroup]) -> list[Microbatch]:
        """Packed rows of at most `microbatch_tokens`; at least one, as every rank takes part in an update."""
        members = list(groups) or [filler()]
        multiple = self.backend.groups.tensor.size
        batches = []
        tokens = [packed_tokens(member.group) for member in members]
        for run in cut(tokens, self.microbatch_tokens, [self.cost(member.group) for member in members]):
            chosen = [members[index] for index in run]
            row = pack([member.group for member in chosen], multiple=multiple)
            batches.append(row.with_targets(_targets(chosen)))
        return batches

    def update(self, batches: Sequence[Microbatch], step: OptimizerStep) -> UpdateResult:
        """One update as `step` says, entropy shaping included."""
        shaped = self._with_entropy_weights(batches) if self.algorithm.entropy.coefficient else list(batches)
        return self.backend.train_step(shaped, self._token_loss, step)

    def _token_loss(self, batch: Microbatch, log_probs: Tensor, entropies: Tensor) -> tuple[Tensor, TokenReport]:
        targets, config = batch.targets, self.algorithm.loss
        assert targets is not None
        objective = resolve_name(config.kind, LOSSES, "algorithm.loss.kind")
        kept = targets.counted > 0  # a filler's token would enter the sums that the objective reports
        losses, marks = objective(
            log_probs[kept],
            targets.old_log_probs[kept],
            targets.advantages[kept],
            _sequences(batch, log_probs.device)[kept],
            **config.options,
        )
        loss = (targets.weights[kept] * losses).sum()
        if self.algorithm.entropy.coefficient:
            loss = loss + (targets.entropy_weights * self._surprise(log_probs, entropies)).sum()
        counted = targets.counted
        by_task = torch.zeros(2, len(self.task_names)).index_add_(
            1, targets.task, torch.stack([entropies.detach() * counted, counted])
        )
        drift = ((log_probs.detach() - targets.old_log_probs) * counted).abs()
        report = {name: mark.sum() for name, mark in marks.items()} | {"tokens": counted.sum()}
        for number, name in enumerate(self.task_names):
            report[f"entropy/{name}"], report[f"tokens/{name}"] = by_task[:, number]
        return loss, TokenReport(sums=report, maxima={"drift": drift.max()})

    def _surprise(self, log_probs: Tensor, entropies: Tensor) -> Tensor:
        return entropies if self.algorithm.entropy.estimator == "full" else -log_probs

    def _with_entropy_weights(self, batches: Sequence[Microbatch]) -> list[Microbatch]:
        """Settle each task's side of its band from the means over all ranks, at the weights of this update."""
        tasks = len(self.task_names)
        totals = np.zeros((2, tasks))
        for batch, score in zip(batches, self.backend.score(batches), strict=True):
            assert batch.targets is not None
            number, counted = batch.targets.task.numpy(), batch.targets.counted.double().numpy()
            values = self._surprise(score.log_probs, score.entropies).double().numpy()
            totals[0] += np.bincount(number, values * counted, tasks)
            totals[1] += np.bincount(number, counted, tasks)
        totals = sum_over(totals.ravel(), self.backend.groups.data).reshape(2, tasks)
        sums, counts = (dict(zip(self.task_names, row.tolist(), strict=True)) for row in totals)
        weights = self._task_weights(sums, counts)
        return [_with_weights(batch, weights) for batch in batches]

    def _task_weights(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> Tensor:
        config = self.algorithm.entropy
        weights = entropy_weights(entropy_sides(sums, counts, config.bands), counts, config.coefficient)
        return torch.tensor([weights[name] for name in self.task_names], dtype=torch.float32)


def _sequences(batch: Microbatch, device: torch.device) -> Tensor:
    """Which response of the row each of its R response tokens is of, int64[R]."""
    lengths = torch.tensor(batch.lengths, device=device)
    return torch.arange(len(lengths), device=device).repeat_interleave(lengths)


def _with_weights(batch: Microbatch, weights: Tensor) -> Microbatch:
    assert batch.targets is not None
    by_token = weights[batch.targets.task] * batch.targets.counted
    return batch.with_targets(replace(batch.targets, entropy_weights=by_token))


def _targets(members: Sequence[TrainGroup]) -> Targets:
    rollouts = [(member, number) for member in members for number in range(len(member.group.rollouts))]
    lengths = torch.tensor([len(member.group.rollouts[number].token_ids) for member, number in rollouts])

    def spread(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths)

    weights = spread([float(member.weights[number]) for member, number in rollouts])
    return Targets(
        old_log_probs=torch.from_numpy(
            np.concatenate([member.group.rollouts[number].log_probs for member, number in rollouts])
        ),
        advantages=spread([float(member.advantages[number]) for member, number in rollouts]),
        weights=weights,
        entropy_weights=torch.zeros_like(weights),
        task=torch.tensor([member.task for member, _ in rollouts]).repeat_interleave(lengths),
        counted=spread([float(member.counted) for member, _ in rollouts]),
    )
