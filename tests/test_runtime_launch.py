"""A process's place in the job from its environment; seeds; the process group."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_vlrl.config.schema import ParallelConfig
from megatron_vlrl.errors import ConfigError
from megatron_vlrl.runtime.launch import World, first_host, needs_local_launch, world_from_env
from megatron_vlrl.runtime.process import joined
from megatron_vlrl.runtime.seed import seed_all

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "gpu[03-05],cpu1",
}
ALONE = World(rank=0, local_rank=0, size=1, launcher="none")


def test_torchrun_says_the_place_even_inside_slurm():
    world = world_from_env({**SLURM, **TORCHRUN})
    assert world == World(rank=3, local_rank=1, size=4, launcher="torchrun", address="node1", port=29500)


def test_srun_says_the_place_and_where_rank_0_is():
    world = world_from_env(SLURM)
    assert (world.rank, world.local_rank, world.size, world.address) == (5, 1, 8, "gpu03")
    assert world.port == world_from_env({**SLURM, "SLURM_PROCID": "0"}).port
    assert world.port != world_from_env({**SLURM, "SLURM_STEP_ID": "1"}).port
    assert 1024 < world.port < 32768


def test_a_batch_script_is_not_a_task_of_srun():
    assert world_from_env({key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"}) == ALONE


def test_no_launcher_is_a_world_of_one():
    assert world_from_env({}) == ALONE


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({**TORCHRUN, "RANK": "x"}, "RANK is 'x'"),
        ({**SLURM, "SLURM_JOB_ID": ""}, "SLURM_JOB_ID is ''"),
    ],
)
def test_a_broken_environment_is_an_error(env, message):
    with pytest.raises(ConfigError, match=message):
        world_from_env(env)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node7", "node7"),
        ("a,b", "a"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("gpu[9,11]", "gpu9"),
        ("queue-dy-p4d-[1-2]", "queue-dy-p4d-1"),
        ("r[1-2]n.cluster", "r1n.cluster"),
    ],
)
def test_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host


def test_who_starts_the_ranks():
    two = ParallelConfig(tensor=2)
    assert needs_local_launch(two, ALONE)
    assert not needs_local_launch(ParallelConfig(), ALONE)
    assert not needs_local_launch(two, World(rank=0, local_rank=0, size=2, launcher="slurm"))
    assert not needs_local_launch(two, World(rank=0, local_rank=0, size=1, launcher="torchrun"))
    assert needs_local_launch(two, World(rank=0, local_rank=0, size=1, launcher="slurm"))


def test_a_seed_fixes_every_generator():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_all(3)
    first = draw()
    assert draw() != first
    seed_all(3)
    assert draw() == first
    seed_all(4)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_a_world_of_one_has_a_process_group_while_the_block_runs():
    assert not dist.is_initialized()
    with joined(ALONE, timeout_seconds=5, threads=1):
        value = torch.ones(1)
        dist.all_reduce(value)
        assert (dist.get_world_size(), value.item()) == (1, 1.0)
    assert not dist.is_initialized()


TASK = """
import os, torch, torch.distributed as dist
from megatron_vlrl.runtime.launch import world_from_env
from megatron_vlrl.runtime.process import joined
world = world_from_env(os.environ)
with joined(world, timeout_seconds=60, threads=1):
    rank = torch.tensor([world.rank])
    dist.all_reduce(rank)
    print(rank.item(), world.size)
"""


def test_tasks_of_srun_meet():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = {**SLURM, "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2", "MASTER_PORT": str(port)}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", TASK],
            env={**os.environ, **here, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [task.communicate(timeout=60)[0] for task in tasks] == ["1 2\n", "1 2\n"]
