"""What each kind of advantage makes of the same rewards: pictures and a table for docs/objectives.md.

    python tools/objectives_figure.py            print the table
    python tools/objectives_figure.py --write    put it and docs/objectives-*.svg in place

Three tasks in one batch of 64 prompts each, eight answers to a prompt, drawn with a fixed seed: sparse right or wrong,
the overlap of boxes, and a reward with a heavy tail. The comparison is Figure 2 of OpenVLThinkerV2 (arXiv 2604.08539).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.typing import NDArray

from megatron_vlrl.algorithms import advantages
from megatron_vlrl.observe.svg import Series, chart_file
from tools.pages import write_parts

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "objectives.md"
PROMPTS, G = 64, 8
KINDS = ("g2rpo", "grpo", "dr_grpo", "ema_grpo", "rloo", "reinforce_plus_plus")
DRAWN_KINDS = KINDS[:4]  # rloo is dr_grpo but for a factor; the last one is flat on two of the tasks
TITLES = {
    "binary": "One answer in ten is right",
    "overlap": "Overlap of boxes",
    "heavy": "A heavy tail",
}
DRAWN = 4.0  # |advantage|; what lies beyond would flatten the rest
SHARES = np.linspace(0.0, 1.0, 25)  # under the 30 points from which a chart smooths


def rewards() -> dict[str, NDArray[np.float64]]:
    """float64[prompts, G] by task; prompts differ in how hard they are."""
    draw = np.random.default_rng(0)
    hard = draw.beta(0.5, 4.5, (PROMPTS, 1))  # mean 0.1
    middle = draw.uniform(0.2, 0.8, (PROMPTS, 1))
    return {
        "binary": (draw.random((PROMPTS, G)) < hard).astype(np.float64),
        "overlap": draw.beta(4 * middle, 4 * (1 - middle), (PROMPTS, G)),
        "heavy": draw.lognormal(0.0, 1.5, (PROMPTS, G)),
    }


def by_kind() -> dict[str, dict[str, NDArray[np.float64]]]:
    """kind -> task -> the advantages of its rollouts; all three tasks are in one batch, as in a run."""
    drawn = rewards()
    flat = np.concatenate([values.ravel() for values in drawn.values()])
    task = np.repeat(list(drawn), PROMPTS * G)
    group = np.repeat(np.arange(len(drawn) * PROMPTS), G)
    return {
        kind: {name: values[task == name] for name in drawn}
        for kind in KINDS
        for values in [advantages(flat, task, group, kind).values]
    }


def charts(found: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> dict[str, str]:
    """File name -> picture: for each task the quantiles of every kind's advantages."""
    return {
        f"objectives-{name}.svg": chart_file(
            f"{title}: advantage (to {DRAWN:g}) by percentile",
            [
                Series(
                    name=kind,
                    points=[(100 * x, y if abs(y) <= DRAWN else None) for x, y in zip(SHARES, quantiles, strict=True)],
                )
                for kind in DRAWN_KINDS
                for quantiles in [np.quantile(found[kind][name], SHARES)]
            ],
        )
        for name, title in TITLES.items()
    }


def table(found: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> str:
    """Variance and greatest |A| of every kind on each task, and how unlike the tasks' variances are."""
    head = "| kind | " + " | ".join(f"{name}: variance, greatest" for name in TITLES) + " | largest / least variance |"
    lines = [head, "|---|" + "---:|" * (len(TITLES) + 1)]
    for kind, of_task in found.items():
        variances = [float(of_task[name].var()) for name in TITLES]
        cells = [
            f"{variance:.3f}, {np.abs(of_task[name]).max():.2f}"
            for name, variance in zip(TITLES, variances, strict=True)
        ]
        lines.append(f"| `{kind}` | {' | '.join(cells)} | {max(variances) / min(variances):.1f} |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/objectives.md and its pictures")
    found = by_kind()
    if parser.parse_args().write:
        for name, picture in charts(found).items():
            (PAGE.parent / name).write_text(picture, encoding="utf-8")
        write_parts(PAGE, {"figure": table(found)})
    else:
        print(table(found))


if __name__ == "__main__":
    main()
