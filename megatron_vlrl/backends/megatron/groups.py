"""megatron-core's process groups, made once and handed on as values."""

from __future__ import annotations

import math

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlrl.parallel.dims import ParallelDims
from megatron_vlrl.parallel.groups import Group, ProcessGroups


def initialise(dims: ParallelDims, timeout_seconds: float) -> tuple[ProcessGroups, ProcessGroupCollection]:
    """Cut the world into groups: ours, and the same as megatron-core's collection.

    megatron-core keeps them in a module of its own; nothing of ours reads them from there.
    """
    dims.check_world(dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=dims.tensor,
        pipeline_model_parallel_size=dims.pipeline,
        virtual_pipeline_model_parallel_size=dims.virtual if dims.virtual > 1 else None,
        expert_model_parallel_size=dims.expert,
        expert_tensor_parallel_size=dims.tensor,
        # megatron-core's groups do not take over the time limit of init_process_group.
        distributed_timeout_minutes=math.ceil(timeout_seconds / 60),
    )
    groups = ProcessGroups(
        dims=dims,
        world=_group(dist.group.WORLD),
        tensor=_group(parallel_state.get_tensor_model_parallel_group()),
        pipeline=_group(parallel_state.get_pipeline_model_parallel_group()),
        data=_group(parallel_state.get_data_parallel_group()),
        model=_group(parallel_state.get_model_parallel_group()),
        expert=_group(parallel_state.get_expert_model_parallel_group()),
    )
    return groups, ProcessGroupCollection.use_mpu_process_groups()


def _group(handle: dist.ProcessGroup | None) -> Group:
    return Group(dist.get_rank(handle), dist.get_world_size(handle), handle)
