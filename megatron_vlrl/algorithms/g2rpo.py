"""Gaussian GRPO (OpenVLThinkerV2, arXiv 2604.08539): rewards in, normal scores of their ranks out.

Ranks make tasks with rewards of any shape and scale alike. Which rewards are ranked together is the scope:
  two_stage      within each prompt's group, then those scores over the whole task
  task           the rewards of the whole task (what differs between easy and hard prompts leaks in)
  group          within each group only
  centered_task  rewards less their group's mean, over the whole task
"""

from __future__ import annotations

import numpy as np

from megatron_vlrl.algorithms.blocks import ascending, gaussian_ranks, kept_blocks, shared, sort_blocks
from megatron_vlrl.algorithms.columns import (
    Bools,
    Floats,
    Ints,
    RewardColumns,
    by_component,
    require,
    require_number,
    require_tolerance,
    settle_invalid,
)
from megatron_vlrl.algorithms.groups import blank_result, block_ids, joined
from megatron_vlrl.errors import ConfigError
from megatron_vlrl.types import AdvantageResult

SCOPES = ("two_stage", "task", "group", "centered_task")


def g2rpo(
    columns: RewardColumns,
    *,
    scope: str = "two_stage",
    components: str = "total",
    tie_tol: float = 1e-9,
    uniform_group: str = "exclude",
    invalid_reward: str = "drop",
    renorm: str = "none",
    min_task_n: int = 0,
) -> AdvantageResult:
    """One normal score for each rollout; bit-equal for every order of the rows.

    components: `total` ranks the reward; `each` ranks every reward component by itself and adds the scores up, each
    with the sign of its weight (0: left out); with scope two_stage the sum of the scores within the group is what is
    ranked over the task. A rollout without a component (NaN) is not ranked in it and gets 0 for it.
    tie_tol: rewards this close share a rank. uniform_group: groups whose rewards are all equal get 0 and are left
    out of the task's ranking (`exclude`), or are ranked in it (`keep`); with `each`, for each component by itself, and
    out of the ranking of sums if nothing differs. invalid_reward: `drop`, `zero` or `error` for NaN and infinity.
    renorm: `unit_std` divides by the standard deviation of each task's ranked rows. min_task_n: with scope two_stage,
    a task with fewer ranked rows keeps its scores within the groups.
    In the result, `tied` means an equal among the rewards ranked together first (in the group for two_stage). With
    `each`, `uniform` means that no component the rollout has differs in its group, and `tied` that it has an equal in
    every component that does.
    """
    _check_options(scope, components, uniform_group, renorm, min_task_n)
    require_tolerance(tie_tol)
    columns, dropped = settle_invalid(columns, invalid_reward)
    ids, exclude = block_ids(columns), uniform_group == "exclude"
    if components == "total":
        result = _first_ranks(columns.rewards, dropped, ids, scope, tie_tol, exclude)
    else:
        parts = []
        for part, weight in by_component(columns, dropped):
            signed = np.sign(weight) * part.rewards
            parts.append(_first_ranks(signed, np.isnan(signed), ids, scope, tie_tol, exclude))
        result = joined(parts, sum((part.values for part in parts), np.zeros(len(dropped))), dropped)
    ranked = ~(dropped | result.uniform) if exclude else ~dropped
    if scope == "two_stage":
        _rank_over_tasks(result.values, ids[1], ranked, tie_tol, min_task_n)
    if renorm == "unit_std":
        _divide_by_std(result.values, ids[1], ranked)
    return result


def _first_ranks(
    values: Floats, dropped: Bools, ids: tuple[Ints, Ints], scope: str, tie_tol: float, exclude: bool
) -> AdvantageResult:
    """Normal scores of what the scope ranks first, with the flags. ids: of groups and of tasks, int64[N]."""
    groups = kept_blocks(values, ids[0], ~dropped)
    result = blank_result(dropped)
    result.uniform[groups.order] = groups.rows(groups.uniform(tie_tol))
    ranked = ~(dropped | result.uniform) if exclude else ~dropped
    if scope == "centered_task":
        centered = np.zeros(len(values))
        centered[groups.order] = groups.centered()
        blocks = sort_blocks(centered, ids[1], ascending(centered, ranked))
    else:
        blocks = sort_blocks(values, ids[1], ascending(values, ranked)) if scope == "task" else groups
    fresh = blocks.fresh(tie_tol)
    result.values[blocks.order] = gaussian_ranks(blocks, fresh)  # 0 where a group is uniform
    result.tied[blocks.order] = shared(fresh)
    np.logical_and(result.tied, ranked, out=result.tied)
    return result


def _rank_over_tasks(scores: Floats, task_ids: Ints, ranked: Bools, tie_tol: float, min_task_n: int) -> None:
    """The second stage, in place: normal scores of each task's ranked scores, if it has `min_task_n` or more."""
    tasks = sort_blocks(scores, task_ids, ascending(scores, ranked))
    again = gaussian_ranks(tasks, tasks.fresh(tie_tol))
    if min_task_n:
        again = np.where(tasks.rows(tasks.sizes < min_task_n), tasks.values, again)
    scores[tasks.order] = again


def _divide_by_std(scores: Floats, task_ids: Ints, ranked: Bools) -> None:
    """Each task's ranked scores by their standard deviation about 0, in place; a task without spread stays 0."""
    tasks = sort_blocks(scores, task_ids, ascending(scores, ranked))
    spread = np.sqrt(tasks.sums(tasks.values**2) / tasks.sizes)
    scores[tasks.order] = tasks.values / tasks.rows(np.where(spread > 0, spread, 1.0))


def _check_options(scope: str, components: str, uniform_group: str, renorm: str, min_task_n: int) -> None:
    require("scope", scope, SCOPES)
    require("components", components, ("total", "each"))
    require("uniform_group", uniform_group, ("exclude", "keep"))
    require("renorm", renorm, ("none", "unit_std"))
    require_number("min_task_n", min_task_n, lambda x: isinstance(x, int) and x >= 0, "a whole number, 0 or more")
    if min_task_n and scope != "two_stage":
        raise ConfigError(f"min_task_n={min_task_n} skips the second stage, which scope {scope!r} has not; set it to 0")
