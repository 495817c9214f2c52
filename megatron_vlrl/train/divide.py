"""A step's groups and advantages -> which group trains on which data rank, in which update, with what weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vlrl.config.schema import Config
from megatron_vlrl.parallel.groups import Group
from megatron_vlrl.train.exchange import Shares, share_out
from megatron_vlrl.train.minibatches import TrainGroup, assign, make_minibatches, trains
from megatron_vlrl.train.update import looks_at_every_token
from megatron_vlrl.types import AdvantageResult, RewardTable, RolloutGroup, ScoredGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Division:
    """updates: this rank's groups of each optimizer update that has anything to learn from, on any rank."""

    updates: tuple[tuple[TrainGroup, ...], ...]
    shares: Shares


def divide(
    batch: Sequence[ScoredGroup],
    table: RewardTable,
    advantages: AdvantageResult,
    settings: Config,
    *,
    step: int,
    cost: Callable[[RolloutGroup], float],
    data: Group,
) -> Division:
    """Cut the step into minibatches and share each out over the data ranks, which all call this.

    batch: this rank's groups; table and advantages: those of all ranks.
    """
    moving = trains(table, advantages, every_token=looks_at_every_token(settings.algorithm))
    chosen = assign(table, moving, settings.train.minibatches, (settings.run.seed, step))
    positions = set(np.unique(table.position[moving]).tolist())
    shares = share_out([one.group for one in batch if one.position in positions], chosen, cost, data)
    minibatches = make_minibatches(
        shares.groups,
        table,
        advantages,
        moving=moving,
        chosen=chosen,
        aggregation=settings.algorithm.loss.aggregation,
        constant=settings.rollout.max_new_tokens,
    )
    return Division(updates=tuple(one.groups for one in minibatches if one.trained), shares=shares)
