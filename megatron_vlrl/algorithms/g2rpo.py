"""Gaussian GRPO (OpenVLThinkerV2, arXiv 2604.08539): rewards in, normal scores of their ranks out.

Ranks make tasks with rewards of any shape and scale alike. Which rewards are ranked together is the scope:
  two_stage      within each prompt's group, then those scores over the whole task
  task           the rewards of the whole task (what differs between easy and hard prompts leaks in)
  group          within each group only
  centered_task  rewards less their group's mean, over the whole task
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from megatron_vlrl.algorithms.blocks import (
    block_sizes,
    block_starts,
    block_sums,
    gaussian_ranks,
    single_tie,
    tie_starts,
    tied_rows,
)
from megatron_vlrl.algorithms.columns import (
    Bools,
    Floats,
    Ints,
    RewardColumns,
    blank_result,
    require,
    require_number,
    settle_invalid,
)
from megatron_vlrl.errors import ConfigError
from megatron_vlrl.types import AdvantageResult

SCOPES = ("two_stage", "task", "group", "centered_task")


def g2rpo(
    columns: RewardColumns,
    *,
    scope: str = "two_stage",
    tie_tol: float = 1e-9,
    uniform_group: str = "exclude",
    invalid_reward: str = "drop",
    renorm: str = "none",
    min_task_n: int = 0,
) -> AdvantageResult:
    """One normal score for each rollout; bit-equal for every order of the rows.

    tie_tol: rewards this close share a rank. uniform_group: groups whose rewards are all equal get 0 and are left
    out of the task's ranking (`exclude`), or are ranked in it (`keep`). invalid_reward: `drop`, `zero` or `error`
    for NaN and infinity. renorm: `unit_std` divides by the standard deviation of each task's ranked rows.
    min_task_n: with scope two_stage, a task with fewer ranked rows keeps its scores within the groups.
    In the result, `tied` means an equal among the rewards ranked together first (in the group for two_stage).
    """
    _check_options(scope, tie_tol, uniform_group, renorm, min_task_n)
    columns, dropped = settle_invalid(columns, invalid_reward)
    order = np.lexsort((columns.rewards, columns.groups, columns.tasks))
    order = order[~dropped[order]] if dropped.any() else order
    rows, uniform = _score_in_groups(columns, order, scope, tie_tol)

    result = blank_result(dropped)
    result.uniform[order] = uniform
    if uniform_group == "exclude" and uniform.any():
        rows = rows.take(~uniform)
    if scope != "group":
        rows = _score_in_tasks(rows, scope, tie_tol, min_task_n)
    result.values[rows.order] = _unit_std(rows) if renorm == "unit_std" else rows.score
    result.tied[rows.order] = rows.tied
    return result


@dataclass(frozen=True, slots=True)
class _Rows:
    """The ranked rows, sorted by task first. order: their places in the table; score: what they are worth so far."""

    order: Ints
    task: Ints
    score: Floats
    tied: Bools

    def take(self, index: Ints | Bools) -> _Rows:
        return _Rows(self.order[index], self.task[index], self.score[index], self.tied[index])


def _score_in_groups(columns: RewardColumns, order: Ints, scope: str, tie_tol: float) -> tuple[_Rows, Bools]:
    """What the scope takes from each group, and which of the rows stand in a uniform one."""
    value, task = columns.rewards[order], columns.tasks[order]
    starts = block_starts(task, columns.groups[order])
    sizes = block_sizes(starts, len(order))
    ties = tie_starts(value, starts, tie_tol)
    if scope == "task":
        score = value
    elif scope == "centered_task":
        score = value - np.repeat(block_sums(value, starts) / sizes, sizes)
    else:
        score = gaussian_ranks(starts, ties, len(order))
    uniform = np.repeat(single_tie(ties, starts), sizes)
    return _Rows(order, task, score, tied_rows(ties, len(order))), uniform


def _score_in_tasks(rows: _Rows, scope: str, tie_tol: float, min_task_n: int) -> _Rows:
    """Normal scores of each task's scores, rows sorted anew."""
    rows = rows.take(np.lexsort((rows.score, rows.task)))
    count = len(rows.order)
    starts = block_starts(rows.task)
    ties = tie_starts(rows.score, starts, tie_tol)
    score = gaussian_ranks(starts, ties, count)
    if scope != "two_stage":
        return replace(rows, score=score, tied=tied_rows(ties, count))
    sizes = block_sizes(starts, count)
    return replace(rows, score=np.where(np.repeat(sizes, sizes) < min_task_n, rows.score, score))


def _unit_std(rows: _Rows) -> Floats:
    """Scores divided by each task's standard deviation, about their mean of 0; tasks without spread stay 0."""
    starts = block_starts(rows.task)
    sizes = block_sizes(starts, len(rows.order))
    spread = np.sqrt(block_sums(rows.score**2, starts) / sizes)
    divisor: Floats = np.repeat(np.where(spread > 0, spread, 1.0), sizes)
    return rows.score / divisor


def _check_options(scope: str, tie_tol: float, uniform_group: str, renorm: str, min_task_n: int) -> None:
    require("scope", scope, SCOPES)
    require("uniform_group", uniform_group, ("exclude", "keep"))
    require("renorm", renorm, ("none", "unit_std"))
    require_number("tie_tol", tie_tol, lambda x: 0 <= x < math.inf, "a finite number, 0 or more")
    require_number("min_task_n", min_task_n, lambda x: isinstance(x, int) and x >= 0, "a whole number, 0 or more")
    if min_task_n and scope != "two_stage":
        raise ConfigError(f"min_task_n={min_task_n} skips the second stage, which scope {scope!r} has not; set it to 0")
