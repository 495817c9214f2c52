"""Ranks started on this machine: one bad end stops all, and the message names the rank and the reason."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vlrl.runtime.failure import Ending, first_cause
from megatron_vlrl.runtime.ranks import run_ranks

# One rank: joins the others, says so, then does what the case says; `wait()` blocks in a collective for its peers.
RANK = """
import os, signal, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from megatron_vlrl.errors import DataError
from megatron_vlrl.runtime import failure
from megatron_vlrl.runtime.launch import world_from_env
from megatron_vlrl.runtime.process import joined
from megatron_vlrl.runtime.ranks import adopt_rank

folder = Path(sys.argv[1])
world = world_from_env(os.environ)
adopt_rank(world, folder / "logs")
print(f"hello from {world.rank}", flush=True)

def wait():
    dist.all_reduce(torch.ones(1))

try:
    with joined(world, timeout_seconds=100, threads=1):
        wait()
        (folder / f"pid-{world.rank}").write_text(str(os.getpid()))
        CASE
except Exception as error:
    failure.record(error, expected=isinstance(error, DataError))
    sys.exit(1)
"""


def _command(folder: Path, case: str) -> list[str]:
    script = folder / "rank.py"
    script.write_text(RANK.replace("CASE", case))
    return [sys.executable, str(script), str(folder)]


def test_a_job_that_ends_well(tmp_path, capfd):
    assert run_ranks(_command(tmp_path, "assert os.environ['OMP_NUM_THREADS'] == '3'"), size=2, threads=3) is None
    assert "hello from 0" in capfd.readouterr().out
    assert "hello from 1" in (tmp_path / "logs/rank-1.log").read_text()
    assert (tmp_path / "logs/rank-0.log").exists()


def test_a_killed_rank_ends_all_and_is_named(tmp_path):
    case = "os.kill(os.getpid(), signal.SIGKILL) if world.rank == 1 else wait()"
    begin = time.monotonic()
    failure = run_ranks(_command(tmp_path, case), size=2, threads=1)
    assert time.monotonic() - begin < 30  # promised
    assert failure is not None
    assert (failure.rank, failure.expected) == (1, False)
    assert "was killed by SIGKILL" in failure.reason
    assert not any(_alive(tmp_path / f"pid-{rank}") for rank in range(2))


def test_an_exception_ends_all_and_its_text_is_told(tmp_path, capfd):
    case = "sum(int(x) for x in ['1', 'boom']) if world.rank == 1 else wait()"
    failure = run_ranks(_command(tmp_path, case), size=2, threads=1)
    assert failure is not None
    assert (failure.rank, failure.expected) == (1, False)
    assert "ValueError" in failure.reason
    assert "boom" in failure.reason
    assert "Traceback" in failure.trace
    assert failure.trace.strip() in (tmp_path / "logs/rank-1.log").read_text()
    assert "SIGTERM" not in capfd.readouterr().err  # torch's own account of stopping the others


def test_an_error_of_ours_is_told_without_a_traceback(tmp_path):
    case = "raise DataError('no shards in x; prepare them')"
    failure = run_ranks(_command(tmp_path, case), size=2, threads=1)
    assert failure is not None
    assert (failure.reason, failure.expected) == ("failed: no shards in x; prepare them", True)


def _alive(pid_file: Path) -> bool:
    try:
        os.kill(int(pid_file.read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def _wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


LAUNCHER = "import sys; from megatron_vlrl.runtime.ranks import run_ranks; run_ranks(sys.argv[1:], size=2, threads=1)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_their_launcher(tmp_path, number):
    command = _command(tmp_path, "time.sleep(300)")
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, *command], stderr=subprocess.DEVNULL)
    pids = [tmp_path / f"pid-{rank}" for rank in range(2)]
    _wait_for(lambda: all(pid.exists() and pid.read_text() for pid in pids))
    launcher.send_signal(number)
    assert launcher.wait(30) != 0
    _wait_for(lambda: not any(_alive(pid) for pid in pids), 10)


def _raised(text: str, when: float) -> Ending:
    error = {"summary": text, "py_callstack": text, "time": when, "expected": False}
    return Ending(exit_code=1, seen=int(when), error=error)


def _silent(code: int, seen: float) -> Ending:
    return Ending(exit_code=code, seen=seen, error=None)


GONE = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer"


@pytest.mark.parametrize(
    ("endings", "cause"),
    [
        ({0: _raised(GONE, 100.2), 1: _silent(-9, 100)}, 1),
        ({0: _raised(GONE, 100.0), 1: _raised("ValueError: x", 100.3)}, 1),
        ({0: _raised("ValueError: y", 100.5), 1: _raised("ValueError: x", 100.3)}, 1),
        ({0: _silent(-15, 101), 1: _raised("ValueError: x", 100.3)}, 1),
        ({0: _silent(-6, 100), 1: _raised("ValueError: x", 100.3)}, 1),
        ({0: _silent(-9, 130), 1: _raised("ValueError: x", 100.3)}, 1),
        ({0: _silent(-15, 101), 1: _silent(3, 101)}, 1),
        ({0: _raised(GONE, 100.2), 1: _silent(-11, 100), 2: _silent(-15, 101)}, 1),
    ],
)
def test_the_cause_is_told_from_its_consequences(endings, cause):
    assert first_cause(endings).rank == cause
