"""Finished runs of one recipe with different seeds -> what they learned, every seed shown, also those that miss a goal.

    python tools/quickstart_seeds.py --runs runs/seeds [--runs DIR ...] [--write docs/learning.md]

A DIR is a run's folder, or one that holds runs' folders. `--write` puts the tables into the page and its curves beside
it; the exit code is 1 where a seed misses a goal.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlrl.config.checks import value_of
from megatron_vlrl.config.load import keys, load
from megatron_vlrl.config.schema import Config
from megatron_vlrl.observe.metrics import METRICS_FILE, read_metrics
from megatron_vlrl.observe.records import read_evaluations
from megatron_vlrl.observe.summary import HEADINGS, SummaryRow, cells, summarize
from megatron_vlrl.observe.svg import Series, chart_file
from tools.pages import write_parts

ROLLOUT_GOAL, HELD_OUT_GOAL = 0.12, 0.08  # gain of the mean over the tasks


@dataclass(frozen=True, kw_only=True)
class SeedRun:
    """A run and its table. rows: by task, the mean over tasks last."""

    config: Config
    metrics: Sequence[dict[str, Any]]
    rows: tuple[SummaryRow, ...]

    @property
    def seed(self) -> int:
        """run.seed."""
        return self.config.run.seed

    @property
    def mean(self) -> SummaryRow:
        """The row over all tasks."""
        return self.rows[-1]

    def misses(self) -> list[str]:
        """What keeps this run from its goals, one short phrase each."""
        steps, wanted = len(self.metrics), self.config.train.steps
        found = [f"unfinished, {steps} of {wanted} steps"] if steps < wanted else []
        _, _, rollouts, _, _, held_out = numbers(self.mean)
        for name, gain, goal in (("rollouts", rollouts, ROLLOUT_GOAL), ("held-out", held_out, HELD_OUT_GOAL)):
            if gain is None:
                found.append(f"{name} not measured")
            elif gain < goal:
                found.append(f"{name} {gain:+.3f}, goal {goal:+.2f}")
        return found


def numbers(row: SummaryRow) -> tuple[float | None, ...]:
    """Rollout accuracy first, last and its change; held-out accuracy before, after and its change."""
    before, after = (None if item is None else item.accuracy for item in (row.before, row.after))
    return (row.first, row.last, _change(row.first, row.last), before, after, _change(before, after))


def _change(old: float | None, new: float | None) -> float | None:
    return None if old is None or new is None else new - old


def find_runs(folders: Sequence[Path]) -> list[SeedRun]:
    """The runs in `folders`, by seed. Raises ValueError for no runs, a seed twice, or runs of different settings."""
    found = []
    for folder in folders:
        inside = [folder] if (folder / METRICS_FILE).exists() else [p.parent for p in folder.glob(f"*/{METRICS_FILE}")]
        if not inside:
            raise ValueError(f"{folder} holds no {METRICS_FILE}, nor does a folder in it")
        found += [read_run(path) for path in inside]
    found.sort(key=lambda run: run.seed)
    seeds = [run.seed for run in found]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"a seed came twice: {seeds}; give each run once")
    for run in found[1:]:
        recipe = [key for key in keys() if not key.startswith("run.")]
        differing = [key for key in recipe if value_of(run.config, key) != value_of(found[0].config, key)]
        if differing:
            raise ValueError(f"seeds {found[0].seed} and {run.seed} are of different recipes: {', '.join(differing)}")
    return found


def read_run(folder: Path) -> SeedRun:
    """A run from its folder's records."""
    metrics = read_metrics(folder)
    return SeedRun(
        config=load(folder / "config.yaml"),
        metrics=metrics,
        rows=summarize(metrics, read_evaluations(folder)).rows,
    )


# ------------------------------------------------------------------ Markdown


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column left and the rest right."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [headings, rule, *rows])


def seeds_table(runs: Sequence[SeedRun]) -> str:
    """One row a seed: the means over its tasks, and what it misses; then mean and standard deviation over the seeds."""
    rows = [[str(run.seed), *cells(run.mean)[1:], "; ".join(run.misses()) or "met"] for run in runs]
    columns = list(zip(*(numbers(run.mean) for run in runs), strict=True))
    rows.append(["mean", *_over_seeds(columns, statistics.fmean), "", ""])
    if len(runs) > 1:
        rows.append(["standard deviation", *_over_seeds(columns, statistics.stdev), "", ""])
    return table(["seed", *HEADINGS[1:], "goals"], rows)


def tasks_table(runs: Sequence[SeedRun]) -> str:
    """One row a task: the means over the seeds, and in how many of them its held-out accuracy rose."""
    rows = []
    for same in zip(*(run.rows for run in runs), strict=True):
        columns = list(zip(*(numbers(row) for row in same), strict=True))
        rose = sum(gain is not None and gain > 0 for gain in columns[-1])
        rows.append([same[0].task, *_over_seeds(columns, statistics.fmean), f"{rose} of {len(runs)}"])
    return table([*HEADINGS[:-1], "seeds in which held-out rose"], rows)


def every_table(runs: Sequence[SeedRun]) -> str:
    """One row for each task of each seed."""
    rows = [[str(run.seed), *cells(row)] for run in runs for row in run.rows[:-1]]
    return table(["seed", *HEADINGS], rows)


def closing_line(runs: Sequence[SeedRun]) -> str:
    """How many seeds miss a goal, and which."""
    goals = f"the goals (rollouts {ROLLOUT_GOAL:+.2f}, held-out {HELD_OUT_GOAL:+.2f}, means over the tasks)"
    missing = {run.seed: run.misses() for run in runs if run.misses()}
    if not missing:
        return f"{len(runs)} of {len(runs)} seeds meet {goals}."
    which = "; ".join(f"seed {seed}: {', '.join(reasons)}" for seed, reasons in missing.items())
    return f"{len(missing)} of {len(runs)} seeds miss {goals}. {which}."


def _over_seeds(columns: Sequence[Sequence[float | None]], of: Callable[[Sequence[float]], float]) -> list[str]:
    """`of` each column with a sign where it is a change; "-" where a seed lacks the number."""
    texts = []
    for number, column in enumerate(columns):
        known = [value for value in column if value is not None]
        sign = "+" if number % 3 == 2 and of is statistics.fmean else ""
        texts.append(format(of(known), f"{sign}.3f") if len(known) == len(column) else "-")
    return texts


# ------------------------------------------------------------------ curves


def charts(runs: Sequence[SeedRun]) -> dict[str, str]:
    """SVG documents by name: rollout accuracy of each seed (mean over tasks), and of each task (mean over seeds)."""
    tasks = [row.task for row in runs[0].rows[:-1]]
    by_seed = [Series(name=f"seed {run.seed}", points=mean_curve([(run, task) for task in tasks])) for run in runs]
    by_task = [Series(name=task, points=mean_curve([(run, task) for run in runs])) for task in tasks]
    return {
        "seeds": chart_file("Rollout accuracy by step, mean over the tasks", by_seed, limits=(0, 1)),
        "tasks": chart_file("Rollout accuracy by step, mean over the seeds", by_task, limits=(0, 1)),
    }


def mean_curve(parts: Sequence[tuple[SeedRun, str]]) -> list[tuple[float, float | None]]:
    """Accuracy by step, averaged over (run, task); only steps at which every one has a number."""
    curves = [{r["step"]: r.get(f"accuracy/{task}") for r in run.metrics} for run, task in parts]
    points: list[tuple[float, float | None]] = []
    for step in sorted(set(curves[0]).intersection(*curves[1:])):
        values = [value for curve in curves if (value := curve[step]) is not None]
        if len(values) == len(curves):
            points.append((step, statistics.fmean(values)))
    return points


def results(runs: Sequence[SeedRun], pictures: Sequence[str]) -> str:
    """All of it as Markdown; pictures: file names of the curves."""
    images = "\n".join(f"![Rollout accuracy by step]({name})" for name in pictures)
    parts = [seeds_table(runs), closing_line(runs), images, tasks_table(runs)]
    details = f"<details><summary>Every task of every seed</summary>\n\n{every_table(runs)}\n\n</details>"
    return "\n\n".join(part for part in [*parts, details] if part)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, or write them and the curves; 1 if a seed misses a goal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--runs", type=Path, action="append", required=True, metavar="DIR")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page with a part called `results`")
    arguments = parser.parse_args(argv)
    runs = find_runs(arguments.runs)
    if arguments.write is None:
        print(results(runs, ()))
    else:
        page: Path = arguments.write
        drawn = {f"{page.stem}-{name}.svg": text for name, text in charts(runs).items()}
        write_parts(page, {"results": results(runs, list(drawn))})
        for name, text in drawn.items():
            (page.parent / name).write_text(text, encoding="utf-8")
        print(closing_line(runs))
    return int(any(run.misses() for run in runs))


if __name__ == "__main__":
    sys.exit(main())
