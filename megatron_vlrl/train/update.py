"""A minibatch of groups -> one optimizer update, and what it measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_vlrl.algorithms.schedules import learning_rate
from megatron_vlrl.algorithms.shaping import entropy_sides, entropy_weights
from megatron_vlrl.backends.protocol import Backend, OptimizerStep, UpdateResult
from megatron_vlrl.config.schema import AlgorithmConfig, Config
from megatron_vlrl.packing import Microbatch, Targets, cut, pack, packed_tokens
from megatron_vlrl.parallel.collectives import sum_over
from megatron_vlrl.train.minibatches import TrainGroup, filler
from megatron_vlrl.train.token_loss import measured_entropy, token_loss
from megatron_vlrl.types import RolloutGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Updater:
    """Takes updates on a backend. cost: of a group, in any unit; microbatches are cut to cost alike."""

    backend: Backend
    task_names: tuple[str, ...]
    microbatch_tokens: int
    cost: Callable[[RolloutGroup], float]

    def prepare(
        self, minibatches: Sequence[Sequence[TrainGroup]], algorithm: AlgorithmConfig, version: int | None
    ) -> list[list[Microbatch]]:
        """The microbatches of a step's updates, with what must be known of them before the first update.

        That is the reference's log-probs, and the old ones where the importance of a token compares the sampler's with
        the trainer's. version: that of the weights now, if the rollouts' text was drawn from a policy at all.
        """
        updates = [self._pack(members, algorithm, version) for members in minibatches]
        if algorithm.loss.importance != "none":  # the first update's old weights are its own
            updates = [*updates[:1], *(self._with_scores(batches, "old_log_probs") for batches in updates[1:])]
        if uses_reference(algorithm):
            updates = [self._with_scores(batches, "reference_log_probs", reference=True) for batches in updates]
        return updates

    def update(self, batches: Sequence[Microbatch], algorithm: AlgorithmConfig, step: OptimizerStep) -> UpdateResult:
        """One update with the optimizer's settings of this step, entropy shaping included."""
        if algorithm.entropy.coefficient:
            weights = self._entropy_weights(batches, algorithm)
            batches = [_with_entropy_weights(batch, weights) for batch in batches]
        loss = partial(token_loss, algorithm=algorithm, tasks=len(self.task_names))
        return self.backend.train_step(batches, loss, step)

    def _pack(self, members: Sequence[TrainGroup], algorithm: AlgorithmConfig, version: int | None) -> list[Microbatch]:
        """Packed rows of at most `microbatch_tokens`; at least one, as every rank takes part in an update."""
        members = list(members) or [filler()]
        tokens = [packed_tokens(member.group) for member in members]
        rows = cut(tokens, self.microbatch_tokens, [self.cost(member.group) for member in members])
        coefficients = torch.tensor([kl_coefficient(algorithm, name) for name in self.task_names], dtype=torch.float32)
        batches = []
        for row in rows:
            chosen = [members[index] for index in row]
            batch = pack([member.group for member in chosen], multiple=self.backend.groups.tensor.size)
            targets = _targets(chosen, version)
            if algorithm.loss.importance == "none":
                targets = replace(targets, old_log_probs=targets.rollout_log_probs)
            kl_weights = targets.weights * coefficients[targets.task]
            batches.append(batch.with_targets(replace(targets, kl_weights=kl_weights)))
        return batches

    def _with_scores(self, batches: Sequence[Microbatch], name: str, *, reference: bool = False) -> list[Microbatch]:
        """The batches with their log-probs at the weights now, or under the reference, as the targets' `name`."""
        scores = self.backend.score(batches, reference=reference)
        return [
            batch.with_targets(replace(_targets_of(batch), **{name: score.log_probs}))
            for batch, score in zip(batches, scores, strict=True)
        ]

    def _entropy_weights(self, batches: Sequence[Microbatch], algorithm: AlgorithmConfig) -> Tensor:
        """The weight of each task's tokens' entropy, Float[Tensor, "tasks"]: its side of its band is settled from the
        means over all ranks at the weights now."""
        tasks = len(self.task_names)
        totals = np.zeros((2, tasks))
        for batch, score in zip(batches, self.backend.score(batches), strict=True):
            number, counted = _targets_of(batch).task.numpy(), _targets_of(batch).counted.double().numpy()
            values = measured_entropy(score.log_probs, score.entropies, algorithm).double().numpy()
            totals += [np.bincount(number, values * counted, tasks), np.bincount(number, counted, tasks)]
        totals = sum_over(totals.ravel(), self.backend.groups.data).reshape(2, tasks)
        sums, counts = (dict(zip(self.task_names, row.tolist(), strict=True)) for row in totals)
        sides = entropy_sides(sums, counts, algorithm.entropy.bands)
        weights = entropy_weights(sides, counts, algorithm.entropy.coefficient)
        return torch.tensor([weights[name] for name in self.task_names], dtype=torch.float32)


def optimizer_step(settings: Config, step: int) -> OptimizerStep:
    """What the updates of step `step`, counted from 0, are taken with."""
    o, steps = settings.optimizer, settings.train.steps
    rate = learning_rate(step, base=o.lr, steps=steps, warmup=o.warmup_steps, decay=o.decay, final_ratio=o.final_ratio)
    return OptimizerStep.of(o, lr=rate)


def kl_coefficient(algorithm: AlgorithmConfig, task: str) -> float:
    """Of the divergence from the reference, for one task; 0 without a reference."""
    return algorithm.kl.by_task.get(task, algorithm.kl.coefficient) if algorithm.kl.reference != "none" else 0.0


def uses_reference(algorithm: AlgorithmConfig) -> bool:
    """Whether any task's divergence from a reference is part of the loss."""
    coefficients = (algorithm.kl.coefficient, *algorithm.kl.by_task.values())
    return algorithm.kl.reference != "none" and any(coefficients)


def looks_at_every_token(algorithm: AlgorithmConfig) -> bool:
    """Whether the loss depends on tokens whose advantage is 0."""
    return bool(algorithm.entropy.coefficient) or uses_reference(algorithm)


def _with_entropy_weights(batch: Microbatch, by_task: Tensor) -> Microbatch:
    targets = _targets_of(batch)
    return batch.with_targets(replace(targets, entropy_weights=by_task[targets.task] * targets.counted))


def _targets_of(batch: Microbatch) -> Targets:
    assert batch.targets is not None
    return batch.targets


def _targets(members: Sequence[TrainGroup], version: int | None) -> Targets:
    rollouts = [(member, number) for member in members for number in range(len(member.group.rollouts))]
    lengths = torch.tensor([len(member.group.rollouts[number].token_ids) for member, number in rollouts])

    def spread(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths)

    fresh = [
        float(member.counted and member.group.rollouts[number].weight_version == version) for member, number in rollouts
    ]
    weights = spread([float(member.weights[number]) for member, number in rollouts])
    return Targets(
        rollout_log_probs=torch.from_numpy(
            np.concatenate([member.group.rollouts[number].log_probs for member, number in rollouts])
        ),
        advantages=spread([float(member.advantages[number]) for member, number in rollouts]),
        weights=weights,
        entropy_weights=torch.zeros_like(weights),
        kl_weights=torch.zeros_like(weights),
        task=torch.tensor([member.task for member, _ in rollouts]).repeat_interleave(lengths),
        counted=spread([float(member.counted) for member, _ in rollouts]),
        fresh=spread(fresh),
    )
