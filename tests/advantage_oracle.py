"""Every kind of advantage as it is written down: plain loops in float64, one group and one task at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean, pstdev, stdev
from typing import Any

import numpy as np

from megatron_vlrl.algorithms import AdvantageResult, advantages

TOLERANCE = 1e-9
Rows = list[int]
State = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Table:
    """N rollouts: one list for each column; weights: one for each component."""

    rewards: list[float]
    tasks: list[int]
    groups: list[int]
    components: list[list[float]]
    weights: list[float]
    lengths: list[int]

    def shuffled(self, order: Rows) -> Table:
        columns = ("rewards", "tasks", "groups", "components", "lengths")
        return replace(self, **{name: [getattr(self, name)[row] for row in order] for name in columns})


def run(table: Table, kind: str, options: Mapping[str, Any]) -> AdvantageResult:
    """The function under test."""
    components = np.array(table.components, dtype=np.float64).reshape(len(table.rewards), len(table.weights))
    columns = (table.rewards, table.tasks, table.groups, kind, components, table.weights)
    return advantages(*columns, lengths=table.lengths, options=options)


def oracle(table: Table, kind: str, options: Mapping[str, Any]) -> tuple[list[float], State]:
    """The advantages of `table`, and the state after it."""
    chosen = dict(options)
    if chosen.pop("invalid_reward", "drop") == "zero":
        table = _with_zeros(table)
    if kind == "ema_grpo":
        return _ema_grpo(table, **chosen)
    return KINDS[kind](table, **chosen), {}


def _with_zeros(table: Table) -> Table:
    failed = [not math.isfinite(reward) for reward in table.rewards]
    return replace(
        table,
        rewards=[0.0 if bad else reward for reward, bad in zip(table.rewards, failed, strict=True)],
        components=[[0.0] * len(row) if bad else row for row, bad in zip(table.components, failed, strict=True)],
    )


def valid_rows(table: Table) -> Rows:
    return [row for row, reward in enumerate(table.rewards) if math.isfinite(reward)]


def rows_by(keys: list[Any], rows: Iterable[int]) -> list[Rows]:
    found = defaultdict(list)
    for row in rows:
        found[keys[row]].append(row)
    return list(found.values())


def groups_of(table: Table, rows: Iterable[int]) -> list[Rows]:
    return rows_by(list(zip(table.tasks, table.groups, strict=True)), rows)


def uniform(values: list[float]) -> bool:
    return max(values) - min(values) <= TOLERANCE


def psi(values: list[float]) -> list[float]:
    """Normal scores of `values`; ties share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    scores = [NormalDist().inv_cdf((place + 0.5) / len(values)) for place in range(len(values))]
    out = [0.0] * len(values)
    begin = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or values[order[end]] - values[order[end - 1]] > TOLERANCE:
            for row in order[begin:end]:
                out[row] = fmean(scores[begin:end])
            begin = end
    return out


def _fill(out: list[float], rows: Rows, values: Iterable[float]) -> None:
    for row, value in zip(rows, values, strict=True):
        out[row] = value


def component_columns(table: Table) -> list[tuple[list[float], float]]:
    """Each component that counts, NaN where the reward failed or the rollout has none, and its weight."""
    columns = []
    for number, weight in enumerate(table.weights):
        if weight:
            pairs = zip(table.components, table.rewards, strict=True)
            column = [row[number] if math.isfinite(row[number]) and math.isfinite(r) else math.nan for row, r in pairs]
            columns.append((column, weight))
    return columns


def informed(table: Table, columns: Iterable[list[float]]) -> set[int]:
    """Rows with a value in a column in which their group is not uniform."""
    found = set()
    for column in columns:
        for rows in groups_of(table, (row for row, value in enumerate(column) if math.isfinite(value))):
            if not uniform([column[row] for row in rows]):
                found.update(rows)
    return found


def g2rpo(
    table: Table,
    *,
    scope: str = "two_stage",
    components: str = "total",
    uniform_group: str = "exclude",
    min_task_n: int = 0,
    renorm: str = "none",
) -> list[float]:
    columns = [table.rewards]
    if components == "each":
        columns = [[math.copysign(1, weight) * x for x in column] for column, weight in component_columns(table)]
    out = [0.0] * len(table.rewards)
    for column in columns:
        for row, score in enumerate(_first_ranks(table, column, scope, uniform_group)):
            out[row] += score
    ranked = valid_rows(table) if uniform_group == "keep" else sorted(informed(table, columns) & {*valid_rows(table)})
    for rows in rows_by(table.tasks, ranked):
        values = [out[row] for row in rows]
        if scope == "two_stage" and len(rows) >= min_task_n:
            values = psi(values)
        if renorm == "unit_std" and any(values):
            spread = math.sqrt(fmean(value**2 for value in values))
            values = [value / spread for value in values]
        _fill(out, rows, values)
    return out


def _first_ranks(table: Table, column: list[float], scope: str, uniform_group: str) -> list[float]:
    out = [0.0] * len(column)
    score, ranked = list(column), []
    for rows in groups_of(table, (row for row, value in enumerate(column) if math.isfinite(value))):
        values = [column[row] for row in rows]
        if uniform_group == "keep" or not uniform(values):
            ranked += rows
        if scope in ("two_stage", "group"):
            _fill(out, rows, psi(values))
        elif scope == "centered_task":
            _fill(score, rows, [value - fmean(values) for value in values])
    if scope in ("task", "centered_task"):
        for rows in rows_by(table.tasks, ranked):
            _fill(out, rows, psi([score[row] for row in rows]))
    return out


def _in_groups(table: Table, column: list[float], transform: Callable[[list[float]], list[float]]) -> list[float]:
    """Transformed values of each group of the finite rows; 0 for those of a uniform one."""
    out = [0.0] * len(column)
    for rows in groups_of(table, (row for row, value in enumerate(column) if math.isfinite(value))):
        values = [column[row] for row in rows]
        if not uniform(values):
            _fill(out, rows, transform(values))
    return out


def _standard(values: list[float], unbiased: bool) -> list[float]:
    spread = (stdev if unbiased else pstdev)(values) + 1e-6
    return [(value - fmean(values)) / spread for value in values]


def grpo(table: Table, *, unbiased: bool = True) -> list[float]:
    return _in_groups(table, table.rewards, lambda values: _standard(values, unbiased))


def dr_grpo(table: Table) -> list[float]:
    return _in_groups(table, table.rewards, lambda values: [value - fmean(values) for value in values])


def rloo(table: Table) -> list[float]:
    def less_the_others(values: list[float]) -> list[float]:
        return [value - fmean(values[:place] + values[place + 1 :]) for place, value in enumerate(values)]

    return _in_groups(table, table.rewards, less_the_others)


def _whiten(table: Table, values: list[float], rows: Rows, token_weighted: bool) -> list[float]:
    """Over `rows`, each as often as it counts; 0 elsewhere."""
    out = [0.0] * len(values)
    batch = [values[row] for row in rows for _ in range(table.lengths[row] if token_weighted else 1)]
    for row in rows:
        out[row] = (values[row] - fmean(batch)) / (pstdev(batch) + 1e-6)
    return out


def reinforce_plus_plus(table: Table, *, baseline: str = "none", token_weighted: bool = False) -> list[float]:
    groups = [rows for rows in groups_of(table, valid_rows(table)) if len(rows) > 1]
    values = list(table.rewards) if baseline == "none" else dr_grpo(table)
    out = _whiten(table, values, [row for rows in groups for row in rows], token_weighted)
    for rows in groups:
        if baseline == "group" and uniform([table.rewards[row] for row in rows]):
            _fill(out, rows, [0.0] * len(rows))
    return out


def gdpo(table: Table, *, unbiased: bool = True, token_weighted: bool = False) -> list[float]:
    columns = component_columns(table)
    score = [0.0] * len(table.rewards)
    for column, weight in columns:
        for row, value in enumerate(_in_groups(table, column, lambda values: _standard(values, unbiased))):
            score[row] += weight * value
    out = _whiten(table, score, valid_rows(table), token_weighted)
    kept = informed(table, [column for column, _ in columns])
    return [value if row in kept else 0.0 for row, value in enumerate(out)]


def ones(table: Table) -> list[float]:
    return [1.0] * len(table.rewards)


def _ema_grpo(
    table: Table, *, variant: str = "onethinker", decay: float = 0.99, state: State | None = None
) -> tuple[list[float], State]:
    out, state = [0.0] * len(table.rewards), dict(state or {})
    for task_rows in rows_by(table.tasks, valid_rows(table)):
        rewards = [table.rewards[row] for row in task_rows]
        groups = [[table.rewards[row] for row in rows] for rows in groups_of(table, task_rows)]
        spreads = [pstdev(values) for values in groups if not uniform(values)]
        if variant == "onethinker":
            now = {"mean": fmean(rewards), "mean_square": fmean(reward**2 for reward in rewards)}
        else:
            now = {"std": fmean(spreads)} if spreads else {}
        name = str(table.tasks[task_rows[0]])
        if now and name in state:
            state[name] = {key: decay * state[name][key] + (1 - decay) * value for key, value in now.items()}
        elif now:
            state[name] = now
        for rows in groups_of(table, task_rows):
            values = [table.rewards[row] for row in rows]
            if not uniform(values):
                _fill(out, rows, _scaled(values, state[name], variant))
    return out, state


def _scaled(values: list[float], averages: dict[str, float], variant: str) -> list[float]:
    centered = [value - fmean(values) for value in values]
    if variant == "paper":
        return [value / (averages["std"] + 1e-6) for value in centered]
    spread = max(math.sqrt(max(averages["mean_square"] - averages["mean"] ** 2, 0.0)), 1e-3)
    if any(abs(value / (spread + 1e-6)) > 5 for value in centered):
        spread = pstdev(values)
    return [value / (spread + 1e-6) for value in centered]


KINDS: dict[str, Callable[..., list[float]]] = {
    "g2rpo": g2rpo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "gdpo": gdpo,
    "ones": ones,
}
