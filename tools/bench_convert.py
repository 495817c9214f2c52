"""How long a conversion takes, as a ratio to copying the same files with safetensors.

One process, one thread of torch's. In every round the three take turns, in each of their six orders as often. All of
them write to the same disk and end when every file is flushed to it; what they wrote is deleted before the next, and
memory touched and freed, since on a virtual machine whoever touches it first pays for it. The first round is dropped.
What is printed are ratios within a round, median and range.

    python tools/bench_convert.py [--folder DIR] [--rounds 12] [--tensor 2] [--pipeline 2]
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_vlrl.checkpoint.convert import convert_from_hf, convert_to_hf
from megatron_vlrl.checkpoint.files import flush, list_files
from megatron_vlrl.parallel.dims import ParallelDims


def copy(source: Path, target: Path) -> None:
    """The yardstick: every weight file loaded tensor by tensor and saved again, and flushed."""
    target.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt", device="cpu") as file:
            save_file({name: file.get_tensor(name) for name in file.keys()}, target / path.name)  # noqa: SIM118
    for name in list_files(target):
        flush(target / name)


def warm(size: int) -> None:
    """Have the machine hold `size` bytes of memory for whoever asks next."""
    torch.empty(size, dtype=torch.uint8).fill_(1)


def timed(work: Callable[[Path, Path], None], source: Path, target: Path) -> tuple[float, float]:
    """Seconds on the clock, and of the processor."""
    start, used = time.perf_counter(), time.process_time()
    work(source, target)
    return time.perf_counter() - start, time.process_time() - used


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a Qwen3-VL's folder; without it a random one of 600 MB is made")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--pipeline", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dims = ParallelDims(tensor=arguments.tensor, pipeline=arguments.pipeline)
    taken: dict[str, list[tuple[float, float]]] = {"copy": [], "import": [], "export": []}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        source = arguments.folder or _synthetic(root / "model")
        checkpoint = root / "checkpoint"
        convert_from_hf(source, checkpoint, dims)
        sides: list[tuple[str, Callable[[Path, Path], None], Path]] = [
            ("copy", copy, source),
            ("import", lambda a, b: convert_from_hf(a, b, dims), source),
            ("export", convert_to_hf, checkpoint),
        ]
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        orders = list(itertools.permutations(sides))
        for number in range(arguments.rounds + 1):
            for kind, work, origin in orders[number % len(orders)]:
                warm(2 * size)
                times = timed(work, origin, root / "out")
                shutil.rmtree(root / "out")
                if number:
                    taken[kind].append(times)
    print(f"{size / 1e6:.0f} MB, tensor {dims.tensor} x pipeline {dims.pipeline}, {arguments.rounds} rounds")
    for kind, pairs in taken.items():
        clock, processor = (ratio(pairs, taken["copy"], which) for which in (0, 1))
        print(f"{kind:<7} {statistics.median(t for t, _ in pairs):6.2f} s   clock {clock}   processor {processor}")


def ratio(times: Sequence[tuple[float, float]], copies: Sequence[tuple[float, float]], which: int) -> str:
    """Median and range of the ratios within a round."""
    values = [mine[which] / theirs[which] for mine, theirs in zip(times, copies, strict=True)]
    return f"{statistics.median(values):.2f} x copy ({min(values):.2f} to {max(values):.2f})"


def _synthetic(folder: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tools.synthetic_model import make_synthetic

    return make_synthetic(folder)


if __name__ == "__main__":
    main()
