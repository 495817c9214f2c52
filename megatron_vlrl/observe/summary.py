"""Did it learn: the records of a run in; one row a task and their mean out, with what is missing and why.

Rollout accuracy is measured on training prompts at the run's temperature; held-out accuracy is
greedy, on items that training never shows. Both are always shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlrl.observe.metrics import read_metrics
from megatron_vlrl.observe.records import read_evaluations

WINDOW = 10
Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Greedy accuracy (0 to 1) on `count` held-out items, with the half-width of its 95% interval."""

    accuracy: float
    half_width: float
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SummaryRow:
    """One task, or the unweighted mean of all. None: not recorded.

    first, last: rollout accuracy over the first and the last ten steps. before, after: held-out greedy accuracy.
    """

    task: str
    first: float | None
    last: float | None
    before: HeldOut | None
    after: HeldOut | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The rows by task, their mean last; reasons: one sentence for each kind of value that is missing."""

    rows: tuple[SummaryRow, ...]
    reasons: tuple[str, ...]


def task_names(metrics: Sequence[Record], evaluations: Sequence[Record]) -> tuple[str, ...]:
    """Every task that was trained or evaluated, in alphabetical order."""
    trained = {
        name.partition("/")[2] for record in metrics for name in record if name.startswith(("accuracy/", "reward/"))
    }
    evaluated = {task for record in evaluations for task in record["tasks"]}
    return tuple(sorted(trained | evaluated))


def pooled_mean(records: Sequence[Record], name: str) -> float | None:
    """The mean of a metric over several steps, each step counting as many times as it had rollouts."""
    parts = [(record[name], record["counts"][name]) for record in records if record.get(name) is not None]
    count = sum(weight for _, weight in parts)
    return sum(value * weight for value, weight in parts) / count if count else None


def held_out(evaluations: Sequence[Record], label: str) -> dict[str, HeldOut]:
    """Greedy accuracies of the last evaluation with that label, by task; empty when there is none."""
    greedy = [record for record in evaluations if record["label"] == label and record["temperature"] == 0]
    tasks = greedy[-1]["tasks"].items() if greedy else ()
    return {
        task: HeldOut(accuracy=item["accuracy"], half_width=item["half_width"], count=int(item["count"]))
        for task, item in tasks
        if item["accuracy"] is not None
    }


def _mean_held_out(items: Sequence[HeldOut | None]) -> HeldOut | None:
    """Unweighted; the tasks' items are independent, so that their half-widths add in quadrature."""
    known = [item for item in items if item is not None]
    if not known or len(known) < len(items):
        return None
    return HeldOut(
        accuracy=sum(item.accuracy for item in known) / len(known),
        half_width=math.sqrt(sum(item.half_width**2 for item in known)) / len(known),
        count=sum(item.count for item in known),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def summarize(metrics: Sequence[Record], evaluations: Sequence[Record]) -> Summary:
    """Rows and reasons from the records; a mean is only given when every task has a value."""
    before, after = held_out(evaluations, "before"), held_out(evaluations, "after")
    rows = [
        SummaryRow(
            task=task,
            first=pooled_mean(metrics[:WINDOW], f"accuracy/{task}"),
            last=pooled_mean(metrics[-WINDOW:], f"accuracy/{task}"),
            before=before.get(task),
            after=after.get(task),
        )
        for task in task_names(metrics, evaluations)
    ]
    mean = SummaryRow(
        task="mean",
        first=_mean([row.first for row in rows]),
        last=_mean([row.last for row in rows]),
        before=_mean_held_out([row.before for row in rows]),
        after=_mean_held_out([row.after for row in rows]),
    )
    return Summary(rows=(*rows, mean), reasons=tuple(_reasons(rows, len(metrics), evaluations)))


def _reasons(rows: Sequence[SummaryRow], steps: int, evaluations: Sequence[Record]) -> list[str]:
    reasons = []
    if steps == 0:
        reasons.append("rollouts: no step was recorded")
    elif steps < 2 * WINDOW:
        reasons.append(f"rollouts: only {steps} steps, so the first and the last {WINDOW} share some")
    for label in ("before", "after"):
        missing = [row.task for row in rows if getattr(row, label) is None]
        if not held_out(evaluations, label):
            reasons.append(f'held-out {label}: no greedy evaluation labelled "{label}" (is evaluate.data set?)')
        elif missing:
            reasons.append(f"held-out {label}: no items of {', '.join(missing)}, so no mean")
    for window in ("first", "last"):
        missing = [row.task for row in rows if getattr(row, window) is None]
        if steps and missing:
            reasons.append(f"rollouts, {window} {WINDOW}: no accuracy of {', '.join(missing)}, so no mean")
    return reasons


HEADINGS = (
    "task",
    f"rollouts, first {WINDOW}",
    f"last {WINDOW}",
    "change",
    "held-out before",
    "after",
    "change",
    "items",
)


def cells(row: SummaryRow) -> tuple[str, ...]:
    """A row as text, one cell for each of HEADINGS; "-" where something is missing."""
    return (
        row.task,
        _number(row.first),
        _number(row.last),
        _change(row.first, row.last),
        _accuracy(row.before),
        _accuracy(row.after),
        _change(*(None if item is None else item.accuracy for item in (row.before, row.after))),
        "/".join(dict.fromkeys(str(item.count) for item in (row.before, row.after) if item is not None)) or "-",
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _accuracy(item: HeldOut | None) -> str:
    return "-" if item is None else f"{item.accuracy:.3f} ± {item.half_width:.3f}"


def _change(old: float | None, new: float | None) -> str:
    return "-" if old is None or new is None else f"{new - old:+.3f}"


def format_summary(summary: Summary) -> str:
    """The table as aligned text, with the reasons for what is missing under it."""
    table = [HEADINGS, *(cells(row) for row in summary.rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADINGS))]
    lines = []
    for line in table:
        task, *numbers = (
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join([task, *numbers]))
    rule = "-" * len(lines[0])
    notes = [f"- {reason}" for reason in summary.reasons]
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], *notes])


def summary_table(folder: Path) -> str:
    """The table that ends a run: accuracy of rollouts and of held-out items, for each task and their mean."""
    return format_summary(summarize(read_metrics(folder), read_evaluations(folder)))
