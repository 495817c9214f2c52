"""Weights, optimizer and random state as shards of a checkpoint, through megatron-core's dist_checkpointing."""

from __future__ import annotations

import os
import pickle
import queue
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import megatron.core.dist_checkpointing.strategies.filesystem_async as mcore_writer
import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from megatron_vlrl.backends.megatron import cpu
from megatron_vlrl.backends.megatron.model import Qwen3VLStage
from megatron_vlrl.backends.megatron.optimizer import parts_of
from megatron_vlrl.backends.megatron.reference import Reference
from megatron_vlrl.backends.megatron.shards import WEIGHTS_ONLY
from megatron_vlrl.errors import CheckpointError
from megatron_vlrl.parallel.groups import ProcessGroups
from megatron_vlrl.runtime.children import die_with_parent

_HAS_REFERENCE = "has_reference"  # among what a checkpoint's ranks have in common; not there: it has none
# A distributed optimizer's state is gathered on one data rank and saved parameter by parameter, for any layout.
_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


def save(
    folder: Path,
    chunks: Sequence[Qwen3VLStage],
    optimizer: MegatronOptimizer,
    groups: ProcessGroups,
    reference: Reference | None,
    *,
    asynchronous: bool,
) -> ShardWriters | None:
    """Write this rank's shards into `folder`, or start processes that do and return them; collective.

    reference: a moving one.
    """
    mcore_writer._results_queue = _Results()
    state = _shards(chunks, optimizer, loading=False)
    state[_HAS_REFERENCE] = reference is not None
    if reference is not None:
        state["reference"] = reference.shards(chunks)
    state["random"] = _random_shard(_random_state(), groups)
    state["layout"] = _layout(groups)
    state["distributed"] = _is_distributed(optimizer)
    with _told_to_all():
        request = dist_checkpointing.save(state, str(folder), async_sharded_save=asynchronous)
        return ShardWriters(request) if asynchronous else None


class ShardWriters:
    """Processes that write the shards as they were when they started; see `backends.protocol.Saving`."""

    def __init__(self, request: AsyncRequest) -> None:
        if request.async_fn is not None:  # None: nothing to write on this rank
            request = request._replace(async_fn=partial(_end_with_rank, request.async_fn))
        self._calls = AsyncCallsQueue()
        self._calls.schedule_async_request(request)

    def finished(self, *, wait: bool) -> bool:
        """Whether every rank's shards are written, and with them the list of all; collective."""
        with _told_to_all(), cpu.on_device():
            self._calls.maybe_finalize_async_calls(blocking=wait)
        return self._calls.get_num_unfinalized_calls() == 0


def _end_with_rank(write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Runs in the writer: it, and the processes that it starts in turn, end when the rank does."""
    die_with_parent()
    os.register_at_fork(after_in_child=die_with_parent)
    write(*args, **kwargs)


@contextmanager
def _told_to_all() -> Iterator[None]:
    """megatron-core raises a BaseException on every rank; what failed is known on rank 0 alone."""
    try:
        yield
    except CheckpointException as error:
        reasons = {str(failure[0]) for failure in error.failures.values()}
        raise CheckpointError("; ".join(sorted(reasons)) or "another rank could not write its shards") from error


def load(
    folder: Path,
    chunks: Sequence[Qwen3VLStage],
    optimizer: MegatronOptimizer,
    groups: ProcessGroups,
    reference: Reference | None,
) -> None:
    """Restore what `save` wrote. The random state is restored at the same layout only: it belongs to ranks.
    `reference`, a moving one, stays as it is if none was saved.

    Of converted weights, which are all such a checkpoint holds, the optimizer takes its masters and starts anew.
    """
    common = dist_checkpointing.load_common_state_dict(str(folder))
    if common.get(WEIGHTS_ONLY):
        _load_weights(folder, chunks)
        optimizer.reload_model_params()
        return
    if common["distributed"] != _is_distributed(optimizer):
        raise CheckpointError(
            f"{folder} was saved with optimizer.distributed={common['distributed']}, and moments of one kind of "
            "optimizer cannot be read by the other; set it so, or start from the exported weights"
        )
    same_layout = common["layout"] == _layout(groups)
    state = _shards(chunks, optimizer, loading=True)
    if reference is not None and common.get(_HAS_REFERENCE):
        state["reference"] = reference.shards(chunks)
    if same_layout:
        state["random"] = _random_shard(None, groups)
    loaded = dist_checkpointing.load(state, str(folder))
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{number}"])
    with torch.no_grad():
        optimizer.load_state_dict(loaded["optimizer"])
    if reference is not None and "reference" in loaded:
        reference.restore(loaded["reference"])
    if same_layout:
        _set_random_state(loaded["random"])


def _load_weights(folder: Path, chunks: Sequence[Qwen3VLStage]) -> None:
    # What a layer keeps besides its weights (FP8 scales) is nobody's to convert, and empty without them.
    wanted = {
        f"model{number}": {
            key: part for key, part in chunk.sharded_state_dict().items() if not key.endswith("_extra_state")
        }
        for number, chunk in enumerate(chunks)
    }
    loaded = dist_checkpointing.load(wanted, str(folder))
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{number}"])


def _shards(chunks: Sequence[Qwen3VLStage], optimizer: MegatronOptimizer, *, loading: bool) -> dict[str, Any]:
    models = {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
    for part in parts_of(optimizer):
        if isinstance(part, DistributedOptimizer):
            part.get_parameter_state_dp_zero = partial(_padded_state, part)
    moments = optimizer.sharded_state_dict(models, is_loading=loading, metadata=_FORMAT)
    for part in (moments, *moments.values()):
        if isinstance(part, dict) and part.get("param_state", 0) is None:
            del part["param_state"]  # a data rank that saves none; megatron-core would warn that ranks differ
    return {**models, "optimizer": moments}


def _padded_state(part: DistributedOptimizer, **options: Any) -> dict[Any, Any] | None:
    """What megatron-core gathers of a distributed optimizer, with the padding between buckets put back.

    It joins buckets without their padding (distrib_optimizer.py:1113) but cuts the result at the padded offsets of
    the parameters (:1501): from the second bucket on, every parameter would be saved with its neighbour's moments.
    """
    state = DistributedOptimizer.get_parameter_state_dp_zero(part, **options)
    for index, buffer in enumerate(part.buffers if state is not None else ()):
        sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
        for joined in state[index].values():
            for name in ("param", "exp_avg", "exp_avg_sq"):
                padded = torch.zeros(buffer.numel, dtype=joined[name].dtype)
                for bucket, values in zip(buffer.buckets, joined[name].split(sizes), strict=True):
                    padded[bucket.offset : bucket.offset + len(values)] = values
                joined[name] = padded
    return state


def _is_distributed(optimizer: MegatronOptimizer) -> bool:
    return any(isinstance(part, DistributedOptimizer) for part in parts_of(optimizer))


def _layout(groups: ProcessGroups) -> list[int]:
    return [groups.dims.tensor, groups.dims.pipeline, groups.dims.data, int(groups.dims.sequence)]


def _random_shard(state: dict[str, Any] | None, groups: ProcessGroups) -> ShardedObject:
    dims = groups.dims
    place = (groups.pipeline.rank, groups.tensor.rank, groups.data.rank)
    return ShardedObject("random_state", state, (dims.pipeline, dims.tensor, dims.data), place, replica_id=0)


def _random_state() -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        # As plain numbers: a checkpoint is read without unpickling arbitrary objects.
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])


class _Results:
    """What a writer hands to the rank that forked it, in memory that both see: one value, in place of a queue.

    megatron-core's queue (filesystem_async.py:55) needs a process of its own, which the first save would wait for; it
    keeps 280 MB, and outlives a killed rank.
    """

    def __init__(self) -> None:
        self._file = open(os.memfd_create("results"), "w+b")  # noqa: SIM115 - closed when it is collected

    def put(self, value: object) -> None:
        """In the writer."""
        pickle.dump(value, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """In the rank, when the writer has ended; queue.Empty if it ended too early."""
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError) as error:
            raise queue.Empty from error
