"""Trains the quickstart with several objectives and seeds, from one warm start, and tells what each learned.

    bash examples/quickstart/run.sh                                    first: data, model, warm start
    python tools/compare_objectives.py --seeds 0 1 2 [--objectives g2rpo grpo ...] [--write docs/objectives-learned.md]
                                       [--set section.key=value ...]   settings for all of them

Every run is shown, also one that learned nothing. A seed draws the order of the data and the answers; objectives are
compared seed by seed. Runs lie in runs/objectives/NAME-seedN; a finished one is kept, so other settings need another
--out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlrl.observe.svg import Series, chart_file
from tools.pages import write_parts
from tools.quickstart_seeds import SeedRun, mean_curve, numbers, read_run, table

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "examples" / "quickstart" / "rl.yaml"

# name -> the settings that it has beside the quickstart's
OBJECTIVES: Mapping[str, Sequence[str]] = {
    "g2rpo": (),
    "g2rpo-group": ("algorithm.advantage.options={scope: group}",),
    "grpo": ("algorithm.advantage={kind: grpo, options: {}}",),
    "dr_grpo": ("algorithm.advantage={kind: dr_grpo, options: {}}", "algorithm.loss.aggregation=constant"),
    "ema_grpo": ("algorithm.advantage={kind: ema_grpo, options: {}}",),
    "rloo": ("algorithm.advantage={kind: rloo, options: {}}",),
    "reinforce_plus_plus": ("algorithm.advantage={kind: reinforce_plus_plus, options: {baseline: group}}",),
    "gspo": ("algorithm.loss={kind: gspo, options: {}}",),
}


def train(name: str, seed: int, out: Path, settings: Sequence[str]) -> Path:
    """One run of an objective, unless it is there; its folder. Raises CalledProcessError where it fails."""
    folder = out / f"{name}-seed{seed}"
    if not (folder / "hf").is_dir():  # written when a run ends
        command = [sys.executable, "-m", "megatron_vlrl", "train", "--config", str(RECIPE)]
        own = [f"run.seed={seed}", f"run.folder={folder}", f"run.name={name}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        subprocess.run([*command, *OBJECTIVES[name], *settings, *own], cwd=ROOT, env=environment, check=True)
    return folder


def summary(runs: Mapping[str, Sequence[SeedRun]]) -> str:
    """One row an objective: mean and standard deviation over its seeds; and its held-out gain less the first one's,
    seed by seed."""
    first = next(iter(runs))
    gains = {name: [numbers(run.mean)[5] for run in of_name] for name, of_name in runs.items()}
    rows = []
    for name, of_name in runs.items():
        columns = list(zip(*(numbers(run.mean) for run in of_name), strict=True))
        differences = [_less(gain, other) for gain, other in zip(gains[name], gains[first], strict=True)]
        compared = "" if name == first else spread(differences)
        rows.append(
            [
                name,
                str(len(of_name)),
                *(spread(columns[place], sign=place in (2, 5)) for place in (2, 3, 4, 5)),
                compared,
            ]
        )
    headings = ["objective", "seeds", "rollouts, gain", "held-out before", "after", "gain", f"gain less {first}'s"]
    return table(headings, rows)


def every_run(runs: Mapping[str, Sequence[SeedRun]]) -> str:
    """One row a run: rollout accuracy of the first and last ten steps, held-out accuracy before and after, by task."""
    tasks = [row.task for row in next(iter(runs.values()))[0].rows]
    rows = []
    for name, of_name in runs.items():
        for run in of_name:
            _, _, rollouts, _, _, held_out = numbers(run.mean)
            by_task = [_signed(numbers(row)[5]) for row in run.rows[:-1]]
            rows.append([name, str(run.seed), _signed(rollouts), _signed(held_out), *by_task])
    return table(["objective", "seed", "rollouts, gain", "held-out, gain", *tasks[:-1]], rows)


def chart(runs: Mapping[str, Sequence[SeedRun]]) -> str:
    """Rollout accuracy by step, mean over tasks and seeds, a line an objective."""
    series = [
        Series(name=name, points=mean_curve([(run, row.task) for run in of_name for row in run.rows[:-1]]))
        for name, of_name in runs.items()
    ]
    return chart_file("Rollout accuracy by step, mean over tasks and seeds", series, limits=(0, 1))


def spread(values: Sequence[float | None], *, sign: bool = True) -> str:
    """Mean ± standard deviation; "-" where one is missing. sign: of a change, shown when positive too."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    deviation = f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):{'+' if sign else ''}.3f}{deviation}"


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES), default=["g2rpo", "grpo"], metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "objectives")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page with a part called `learned`")
    parser.add_argument("--set", dest="settings", nargs="+", default=[], metavar="section.key=value")
    arguments = parser.parse_args(argv)
    runs = {
        name: [read_run(train(name, seed, arguments.out, arguments.settings)) for seed in arguments.seeds]
        for name in arguments.objectives
    }
    text = f"{summary(runs)}\n\n{every_run(runs)}"
    if arguments.write is None:
        print(text)
        (arguments.out / "objectives.svg").write_text(chart(runs), encoding="utf-8")
        print(f"\ncurves: {arguments.out / 'objectives.svg'}")
    else:
        page: Path = arguments.write
        write_parts(page, {"learned": f"![Rollout accuracy by step]({page.stem}.svg)\n\n{text}"})
        page.with_suffix(".svg").write_text(chart(runs), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
