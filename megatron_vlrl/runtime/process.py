"""A World in, a joined process group for as long as a block runs; and a stack trace on request."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_vlrl.runtime import device
from megatron_vlrl.runtime.launch import World


@contextmanager
def joined(world: World, *, timeout_seconds: float, threads: int) -> Iterator[None]:
    """Join torch's default process group, a world of one included, and leave it when the block ends well.

    A collective that waits longer than `timeout_seconds` raises. A crash in native code, and `kill -USR1 PID`, write
    every thread's stack to stderr. When the block fails the group is left to the end of the process: closing it
    waits for peers, while the end of the process tells them at once.
    """
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(threads)
    device.claim_device(world.local_rank)
    dist.init_process_group(
        device.distributed_backend(),
        store=_store(world, timeout_seconds),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    yield
    dist.destroy_process_group()


def _store(world: World, timeout_seconds: float) -> dist.Store:
    if world.size == 1:
        return dist.HashStore()
    timeout = timedelta(seconds=timeout_seconds)
    if world.launcher == "torchrun":  # who hosts the store is agreed between torch and its launcher
        store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=timeout))
        return store
    return dist.TCPStore(world.address, world.port, world.size, is_master=world.rank == 0, timeout=timeout)
