"""What a conversion holds in memory, measured in a process of its own: never more than two of the largest tensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlrl.models.hf_files import HFWeights
from tools.synthetic_model import make_synthetic

pytestmark = pytest.mark.slow

# The greatest resident size is reset after everything is imported, so that what remains is the conversion's own.
CODE = """
import sys
from pathlib import Path
from megatron_vlrl.checkpoint.convert import convert_from_hf, convert_to_hf
from megatron_vlrl.parallel.dims import ParallelDims
import torch
torch.set_num_threads(1)
def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
tiny, source, target = map(Path, sys.argv[2:])
convert_from_hf(tiny, target.parent / "warm", ParallelDims())  # what is loaded late is loaded
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS")
if sys.argv[1] == "import":
    convert_from_hf(source, target, ParallelDims(tensor=2, pipeline=2))
else:
    convert_to_hf(source, target)
print(1024 * (kilobytes("VmHWM") - before))
"""
SLACK = 16e6  # bytes: the allocator's and the hash's own


def peak(direction: str, *paths: Path) -> float:
    command = [sys.executable, "-c", CODE, direction, *map(str, paths)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.timeout(300)
def test_the_peak_stays_under_two_of_the_largest_tensors(tmp_path):
    from tests.tiny import make_tiny

    tiny, source = make_tiny(tmp_path / "tiny"), make_synthetic(tmp_path / "model")
    infos = HFWeights(source).infos()
    sizes = [info.dtype.itemsize * _numel(info.shape) for info in infos.values()]
    assert sum(sizes) > 5e8
    imported = peak("import", tiny, source, tmp_path / "a" / "checkpoint")
    exported = peak("export", tiny, tmp_path / "a" / "checkpoint", tmp_path / "b" / "hf")
    print(f"largest tensor {max(sizes) / 1e6:.0f} MB, import {imported / 1e6:.0f} MB, export {exported / 1e6:.0f} MB")
    assert imported < 2 * max(sizes) + SLACK
    assert exported < 2 * max(sizes) + SLACK
    ours, theirs = HFWeights(tmp_path / "b" / "hf"), HFWeights(source)
    assert ours.infos() == theirs.infos()


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
