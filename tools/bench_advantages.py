"""How long G²RPO takes for a step's rewards, as a ratio to one numpy lexsort of the same keys.

The yardstick is `np.lexsort((reward, group, task))` of the table that `advantages` gets: prompts in order with 8
answers each, every prompt of a random task, random rewards. All run in one process on one thread and take turns, also
in who begins a round. CPU seconds, ratios within a round, median and range; the first round is dropped. The largest
table comes first, so that the allocator has met large arrays, as it has in a run.

    python tools/bench_advantages.py [--rounds 6] [--rewards continuous | quarters | binary]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
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
LEAST_SECONDS = 0.005  # of one timing, in which a call on a small table is repeated


def contestants(rows: int, tasks: int, rewards: str) -> dict[str, Callable[[], object]]:
    """The lexsort and each scope, on one random table."""
    random = np.random.default_rng([rows, tasks])
    group = np.arange(rows) // 8
    task = random.integers(0, tasks, int(group[-1]) + 1)[group]
    reward = REWARDS[rewards](random.random(rows))
    sort = partial(np.lexsort, (reward, group, task))
    return {"lexsort": sort, **{scope: partial(advantages, reward, task, group, scope=scope) for scope in LIMITS}}


def seconds(call: Callable[[], object], repeats: int) -> float:
    """CPU seconds of one call, the mean of `repeats`."""
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def measure(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each call in each round but the first."""
    names = list(calls)
    repeats = {name: max(1, round(LEAST_SECONDS / max(seconds(calls[name], 3), 1e-6))) for name in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(seconds(calls[name], repeats[name]))
    return {name: values[1:] for name, values in taken.items()}


def main() -> None:
    """Parse, measure, print a Markdown table and what is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--rewards", choices=sorted(REWARDS), default="continuous")
    arguments = parser.parse_args()
    print(f"| rows | tasks | lexsort, ms | {' | '.join(f'{scope} (limit {x:.0f})' for scope, x in LIMITS.items())} |")
    print(f"|{' ---: |' * (len(LIMITS) + 3)}")
    over = []
    for rows in ROWS:
        for tasks in TASKS:
            taken = measure(contestants(rows, tasks, arguments.rewards), arguments.rounds)
            cells = [f"{rows:,}", str(tasks), f"{1e3 * statistics.median(taken['lexsort']):.3g}"]
            for scope, limit in LIMITS.items():
                ratios = [mine / sort for mine, sort in zip(taken[scope], taken["lexsort"], strict=True)]
                middle = statistics.median(ratios)
                cells.append(f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
                over += [f"{scope} of {rows:,} rows and {tasks} tasks: {middle:.2f}"] if middle > limit else []
            print(f"| {' | '.join(cells)} |", flush=True)
    print("\nover the limit: " + ("; ".join(over) or "none"))


if __name__ == "__main__":
    main()
