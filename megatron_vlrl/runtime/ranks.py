"""A command in, so many copies of it run as ranks on this machine; the first failure, or None, out.

torch's own process launcher starts and watches them. Rank 0 keeps the terminal; every rank has a log file.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vlrl.runtime.children import die_with_parent
from megatron_vlrl.runtime.failure import Ending, RankFailure, first_cause, read_error
from megatron_vlrl.runtime.launch import World, thread_environment
from megatron_vlrl.runtime.logs import start_logging

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import PContext

# Set in the ranks that `run_ranks` starts: the launcher's process id.
LAUNCHER_PID = "MEGATRON_VLRL_LAUNCHER_PID"
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_GRACE_SECONDS = 10  # for ranks to end after a signal, before SIGKILL
_POLL_SECONDS = 0.1


def run_ranks(command: Sequence[str], *, size: int, threads: int) -> RankFailure | None:
    """Run `size` copies of `command` with torchrun's variables set, until all end well or one does not.

    threads: CPU threads of each. One bad end stops all. Ctrl-C stops all and raises KeyboardInterrupt;
    another deadly signal stops all and raises SystemExit(128 + signal).
    """
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, start_processes

    # The launcher holds the store, at a port the system picks: no race for it, and it outlives any rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = _environment(store.port, size, threads)
    with tempfile.TemporaryDirectory(prefix="megatron-vlrl-") as folder, _own_signals(), _quiet_launcher():
        context = start_processes(
            "rank",
            command[0],
            args={rank: tuple(command[1:]) for rank in range(size)},
            envs={rank: {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)},
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            result = context.wait(period=_POLL_SECONDS)
        except SignalException as error:
            _stop(context, error.sigval)
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None
        if result is None or not result.is_failed():
            return None
        endings = {
            rank: Ending(exit_code=end.exitcode, seen=end.timestamp, error=read_error(end.error_file))
            for rank, end in result.failures.items()
        }
    return first_cause(endings)


def adopt_rank(world: World, logs: Path) -> None:
    """Make this process the rank that it is: its log file, and an end with its launcher if `run_ranks` started it."""
    launcher = os.environ.pop(LAUNCHER_PID, None)  # not for processes that this one starts
    if launcher is not None:
        die_with_parent()  # however the launcher ends: ranks are in sessions of their own
        if os.getppid() != int(launcher):
            raise SystemExit(1)  # it ended before that line
    start_logging(logs, world.rank, redirect=launcher is not None and world.rank > 0)


def _environment(port: int, size: int, threads: int) -> dict[str, str]:
    environment = {
        **thread_environment(threads),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        LAUNCHER_PID: str(os.getpid()),
    }
    if sys.platform == "linux":
        # Without it gloo looks the host's name up, which takes long or fails on many laptops and containers.
        environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return environment


def _stop(context: PContext, received: signal.Signals) -> None:
    for number in _HANDLED:  # a second Ctrl-C must not leave ranks behind
        signal.signal(number, signal.SIG_IGN)
    context.close(received, timeout=_GRACE_SECONDS)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Give back the signal handlers that torch's launcher replaces."""
    before = {number: signal.getsignal(number) for number in _HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Keep torch's warnings about stopping ranks off the screen: the failure is reported once, by the caller."""
    logger = logging.getLogger("torch.distributed.elastic")
    handler, propagate = logging.NullHandler(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
