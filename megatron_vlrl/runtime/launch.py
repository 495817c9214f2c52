"""The environment in, this process's place in the job out: under torchrun, SLURM's srun, or on its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_vlrl.config.schema import ParallelConfig
from megatron_vlrl.errors import ConfigError

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
# SLURM_STEP_ID tells a task that srun started from the batch script itself, which also has SLURM_PROCID=0.
_SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_ID")
_FIRST_PORT, _PORTS = 20_000, 12_000  # below Linux's ephemeral ports


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """rank: 0..size-1 over all machines; local_rank: on this machine. The address is where rank 0 is met."""

    rank: int
    local_rank: int
    size: int
    launcher: Literal["none", "torchrun", "slurm"]
    address: str = "127.0.0.1"
    port: int = 0


def world_from_env(env: Mapping[str, str]) -> World:
    """This process's place, from torchrun's variables, else SLURM's, else a world of one.

    Raises ConfigError for variables that are incomplete or not numbers.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        missing = [name for name in (*_TORCHRUN, "MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing:
            raise ConfigError(f"RANK or WORLD_SIZE is set but {', '.join(missing)} is not; start with torchrun or srun")
        return World(
            rank=_number(env, "RANK"),
            local_rank=_number(env, "LOCAL_RANK"),
            size=_number(env, "WORLD_SIZE"),
            launcher="torchrun",
            address=env["MASTER_ADDR"],
            port=_number(env, "MASTER_PORT"),
        )
    if all(name in env for name in _SLURM):
        return World(
            rank=_number(env, "SLURM_PROCID"),
            local_rank=_number(env, "SLURM_LOCALID"),
            size=_number(env, "SLURM_NTASKS"),
            launcher="slurm",
            address=env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1")),
            port=_number(env, "MASTER_PORT") if "MASTER_PORT" in env else _slurm_port(env),
        )
    return World(rank=0, local_rank=0, size=1, launcher="none")


def degrees(parallel: ParallelConfig) -> int:
    """The number of processes that the degrees ask for."""
    return parallel.tensor * parallel.pipeline * parallel.data


def needs_local_launch(parallel: ParallelConfig, world: World) -> bool:
    """Whether this process must start the ranks itself: more than one is wanted, and nobody started them.

    A single srun task counts as nobody; torchrun with one process was asked for by name and is left alone.
    """
    return degrees(parallel) > 1 and world.size == 1 and world.launcher != "torchrun"


def thread_environment(threads: int) -> dict[str, str]:
    """Variables that pin a process's CPU threads, to be set before torch is imported.

    PASSIVE: threads that wait sleep, so that ranks sharing cores do not spin against each other.
    """
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}


def first_host(nodelist: str) -> str:
    """The first machine of a SLURM node list: `gpu[03-05,9],cpu1` gives gpu03."""
    match = re.match(r"([^,\[]+)(?:\[([^\]\-,]+)[^\]]*\])?([^,\[]*)", nodelist)
    if match is None:
        raise ConfigError(f"SLURM's node list {nodelist!r} cannot be read; set MASTER_ADDR to rank 0's machine")
    return "".join(part or "" for part in match.groups())


def _slurm_port(env: Mapping[str, str]) -> int:
    # Every task of a step must come to the same number, and two steps on a machine to different ones.
    return _FIRST_PORT + (_number(env, "SLURM_JOB_ID") * 31 + _number(env, "SLURM_STEP_ID")) % _PORTS


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"the environment variable {name} is {env.get(name)!r}; expected a number") from error
