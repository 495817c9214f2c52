"""What megatron-core does on a CPU without each shim, so that we learn when one is no longer needed.

S5 and S6 are about experts: tests/test_moe.py.
"""

from __future__ import annotations

import traceback
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from megatron_vlrl.backends.megatron import cpu
from megatron_vlrl.backends.protocol import TokenReport
from megatron_vlrl.packing import Microbatch, pack
from tests.reference import at_rate, backend_options, make_groups, renderer_and_sampling
from tests.spawn import run_ranks
from tests.tiny import make_tiny

TRACKER = ("CudaRNGStatesTracker", "_get_cuda_rng_state", "_set_cuda_rng_state")
# shim -> the attributes that cpu.install() changes for it
CHANGED = {
    "S1": [(torch.cuda, "current_device")],
    "S3": [(cpu.mcore_random, name) for name in TRACKER],
    "S4": [(torch.cuda, "synchronize")],
    "S5": [(MoEAlltoAllTokenDispatcher, name) for name in ("cuda_dtoh_stream", "_maybe_dtoh_and_synchronize")],
    "S6": [(cpu.mcore_mappings, name) for name in ("_gather_along_first_dim", "_reduce_scatter_along_first_dim")],
}


def leave_out(shim: str) -> None:
    """From now on cpu.install() and cpu.on_device() do all but `shim`, in this process."""
    if shim == "S2":
        cpu.on_device = nullcontext
        return
    install, before = cpu.install, [(owner, name, getattr(owner, name)) for owner, name in CHANGED.get(shim, [])]

    def partly() -> None:
        install()
        for owner, name, value in before:
            setattr(owner, name, value)

    cpu.install = partly


def mean_surprise(batch: Microbatch, log_probs: Tensor, entropies: Tensor) -> tuple[Tensor, TokenReport]:
    return -log_probs.mean(), TokenReport(sums={}, maxima={})


def life(folder: Path, target: Path, shim: str) -> tuple[str, list[str]]:
    """Build, train and save with all shims but `shim`: (what failed, the functions on the way), or ("nothing", [])."""
    from megatron_vlrl.backends import build_backend

    leave_out(shim)
    renderer, sampling = renderer_and_sampling(folder)
    done = "build"
    try:
        backend = build_backend(backend_options(folder, sampling))
        done = "step"
        backend.train_step([pack(make_groups(renderer)[:1])], mean_surprise, at_rate(1e-3))
        done = "save"
        backend.save(target)
    except (AssertionError, RuntimeError) as error:  # how torch without CUDA answers
        return done, [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return "nothing", []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"), layers=1, vision_depth=1, deepstack=(0,))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shims are inert where CUDA exists")
@pytest.mark.parametrize(
    ("shim", "stage", "function"),
    [
        ("none", "nothing", None),
        ("S1", "build", "current_device"),
        ("S2", "build", "_lazy_init"),
        ("S3", "build", "get_rng_state"),
        ("S4", "save", "synchronize"),
    ],
)
def test_megatron_core_still_needs_each_shim(
    shim: str, stage: str, function: str | None, folder: Path, tmp_path: Path
) -> None:
    ((failed, functions),) = run_ranks(life, 1, folder, tmp_path, shim)
    if function is None:
        assert failed == "nothing", functions
    else:
        assert failed == stage, f"without {shim}: {functions or 'megatron-core runs: take it out of cpu.py'}"
        assert function in functions


def test_the_shims_are_inert_where_cuda_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    places = [place for changed in CHANGED.values() for place in changed]
    before = [getattr(owner, name) for owner, name in places]
    cpu.install()
    assert [getattr(owner, name) for owner, name in places] == before
    assert isinstance(cpu.on_device(), nullcontext)
    assert not isinstance(cpu.on_device(), cpu.CudaLiteralsToCpu)


def test_tensors_asked_for_on_cuda_are_made_on_the_cpu() -> None:
    with cpu.CudaLiteralsToCpu():
        assert torch.empty(2, device="cuda").device.type == "cpu"
        made = torch.zeros(2, device="cpu")
        assert made.cuda() is made
        assert made.type() == "torch.cuda.FloatTensor"
    assert made.type() == "torch.FloatTensor"


def test_the_tracker_draws_from_its_own_state_and_gives_the_outer_back() -> None:
    tracker = cpu.CpuRngTracker()
    tracker.add("one", 5)
    with pytest.raises(ValueError, match="'one'"):
        tracker.add("one", 6)
    with pytest.raises(ValueError, match="seed 5"):
        tracker.add("two", 5)
    torch.manual_seed(0)
    expected_outside = torch.rand(3, generator=torch.Generator().manual_seed(0))
    expected_inside = torch.rand(4, generator=torch.Generator().manual_seed(5))
    with tracker.fork("one"):
        first = torch.rand(2)
    outside = torch.rand(3)
    with tracker.fork("one"):
        second = torch.rand(2)
    assert torch.equal(torch.cat([first, second]), expected_inside)
    assert torch.equal(outside, expected_outside)
