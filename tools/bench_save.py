"""How long a checkpoint keeps training waiting: written before training goes on, against written meanwhile.

One process, one thread of torch's; another core is free to write. In every round both kinds save the same model, and
training goes on until its checkpoint counts. Printed are the seconds for which training stood still, which a run
reports as `seconds/save`, and the ratio within a round, median and range; and how long an update takes meanwhile. The
first save of each kind is given by itself.

    python tools/bench_save.py [--rounds 9] [--width 4]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--width", type=int, default=4, help="of the model, in widths of the quickstart's")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from megatron_vlrl.runtime.launch import World
    from megatron_vlrl.runtime.process import joined
    from tools.bench_rows import make_model

    world = World(rank=0, local_rank=0, size=1, launcher="none")
    with tempfile.TemporaryDirectory() as folder, joined(world, timeout_seconds=60, threads=1):
        make_model(Path(folder) / "model", arguments.width)
        measure(Path(folder) / "model", Path(folder) / "checkpoints", arguments.rounds)


def measure(model: Path, checkpoints: Path, rounds: int) -> None:
    """Both kinds of saving in turns, each as often first."""
    from megatron_vlrl.checkpoint.manifest import Manifest
    from megatron_vlrl.checkpoint.store import CheckpointStore
    from megatron_vlrl.parallel.collectives import world_group
    from tools.bench_rows import SHAPES, make_backend, make_groups, ours

    backend = make_backend(model)
    train = ours(backend, make_groups(SHAPES["quickstart"], model)[:4])
    store = CheckpointStore(checkpoints, keep=1, world=world_group())

    def update() -> float:
        start = time.perf_counter()
        train("grouped")
        return time.perf_counter() - start

    def save(number: int, *, asynchronous: bool) -> tuple[float, list[float]]:
        """Seconds of standing still, and of each update until the checkpoint counted."""
        updates = []
        path = store.save(number, lambda part: backend.save(part, asynchronous=asynchronous), layout={})
        while path is None:
            updates.append(update())
            path = store.poll()
        return store.take_blocked_seconds(), updates

    taken: dict[bool, list[Any]] = {False: [], True: []}
    alone = []
    for number in range(rounds + 1):
        alone += [update() for _ in range(3)]
        for asynchronous in (False, True) if number % 2 else (True, False):
            taken[asynchronous].append(save(2 * number + asynchronous + 1, asynchronous=asynchronous))
    size = sum(file.size for file in Manifest.read(next(checkpoints.glob("step-*"))).files.values())
    report(size, taken, alone[3:])


def report(size: int, taken: dict[bool, list[tuple[float, list[float]]]], alone: Sequence[float]) -> None:
    """Medians and ranges over the rounds."""
    blocked = {kind: [seconds for seconds, _ in saves] for kind, saves in taken.items()}
    ratios = [mine / theirs for mine, theirs in zip(blocked[True][1:], blocked[False][1:], strict=True)]
    meanwhile = [seconds for _, updates in taken[True][1:] for seconds in updates]
    print(f"a checkpoint of {size / 1e6:.0f} MB, {len(ratios)} rounds; seconds for which training stands still")
    print(f"written before training goes on   {_spread(blocked[False][1:])}   the first {blocked[False][0]:.3f}")
    print(f"written meanwhile                 {_spread(blocked[True][1:])}   the first {blocked[True][0]:.3f}")
    print(f"ratio                             {_spread(ratios)}")
    print(f"an update                         {_spread(alone)}")
    print(f"an update meanwhile               {_spread(meanwhile)}")


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
