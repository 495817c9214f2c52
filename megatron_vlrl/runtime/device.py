"""What this process computes on: its device, and the library that joins processes on it."""

from __future__ import annotations

import torch


def device() -> torch.device:
    """This process's CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def distributed_backend() -> str:
    """`nccl` with CUDA, else `gloo`."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def claim_device(local_rank: int) -> None:
    """Make the accelerator number `local_rank` of this machine this process's own; nothing to do on CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
