"""How long G²RPO takes for a step's rewards, as a ratio to one numpy lexsort of the same keys.

The yardstick is `np.lexsort((reward, group, task))` of the very arrays that `advantages` gets. A table has prompts of 8
answers each, every prompt of a random task, random rewards; its rows are in the order of prompts, as a step's are, or
shuffled. Each call gets a table that it has not just seen, as a step does: a processor learns the branches of a small
table that is sorted over and over, and a lexsort of 1,000 rows then takes a third of its time.

All run in one process on one thread and take turns, also in who begins a round. CPU seconds, ratios within a round,
median and range; the first round is dropped. The largest table comes first, so that the allocator has met large
arrays, as it has in a run.

    python tools/bench_advantages.py [--rounds 6] [--rewards continuous binary] [--order prompts | shuffled]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlrl.algorithms import advantages

ROWS, TASKS = (1_000_000, 100_000, 10_000, 1_000), (1, 8, 64)
LIMITS = {"group": 2.0, "task": 2.0, "centered_task": 2.0, "two_stage": 4.0}
REWARDS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "continuous": lambda x: x,
    "quarters": lambda x: np.round(4 * x) / 4,
    "binary": np.round,
}
CALLS_ROWS = 200_000  # rows of the tables of one timing: 200 tables of 1,000 rows, 1 of 1,000,000

Table = tuple[np.ndarray, np.ndarray, np.ndarray]


def table(rows: int, tasks: int, rewards: str, order: str, number: int) -> Table:
    """Rewards, tasks and groups of a random table; another for each number."""
    random = np.random.default_rng([rows, tasks, number])
    group = np.arange(rows) // 8
    task = random.integers(0, tasks, int(group[-1]) + 1)[group]
    reward = REWARDS[rewards](random.random(rows))
    places = random.permutation(rows) if order == "shuffled" else np.arange(rows)
    return reward[places], task[places], group[places]


def lexsort(reward: np.ndarray, task: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The yardstick: rows by task, then group, then reward."""
    return np.lexsort((reward, group, task))


def seconds(call: Callable[..., object], tables: Sequence[Table]) -> float:
    """CPU seconds of one call, the mean over the tables."""
    start = time.process_time()
    for columns in tables:
        call(*columns)
    return (time.process_time() - start) / len(tables)


def measure(tables: Sequence[Table], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of the lexsort and of each scope in each round but the first."""
    calls: dict[str, Callable[..., object]] = {
        "lexsort": lexsort,
        **{scope: partial(advantages, scope=scope) for scope in LIMITS},
    }
    names = list(calls)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(seconds(calls[name], tables))
    return {name: values[1:] for name, values in taken.items()}


def report(case: str, taken: Mapping[str, Sequence[float]]) -> list[str]:
    """Print one line of the table; what is over its limit."""
    cells, over = [f"{1e3 * statistics.median(taken['lexsort']):.3g}"], []
    for scope, limit in LIMITS.items():
        ratios = [mine / sort for mine, sort in zip(taken[scope], taken["lexsort"], strict=True)]
        middle = statistics.median(ratios)
        cells.append(f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        if middle > limit:
            over.append(f"{case} | {scope}: {middle:.2f}, {1e3 * statistics.median(taken[scope]):.3g} ms")
    print(f"| {case} | {' | '.join(cells)} |", flush=True)
    return over


def main() -> None:
    """Parse, measure, print a Markdown table and what is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--rewards", nargs="+", choices=sorted(REWARDS), default=["continuous", "binary"])
    parser.add_argument("--order", choices=["prompts", "shuffled"], default="prompts")
    arguments = parser.parse_args()
    scopes = " | ".join(f"{scope} (limit {limit:.0f})" for scope, limit in LIMITS.items())
    print(f"| rewards | rows | tasks | lexsort, ms | {scopes} |\n| --- |{' ---: |' * (len(LIMITS) + 3)}")
    over = []
    for rewards, rows, tasks in itertools.product(arguments.rewards, ROWS, TASKS):
        count = max(1, CALLS_ROWS // rows)
        tables = [table(rows, tasks, rewards, arguments.order, number) for number in range(count)]
        over += report(f"{rewards} | {rows:,} | {tasks}", measure(tables, arguments.rounds))
    print("\n".join(["", "over the limit:", *(over or ["nothing"])]))


if __name__ == "__main__":
    main()
