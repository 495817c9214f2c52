"""The few collectives the host side needs, each over a `Group` that is passed in."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_vlrl.parallel.groups import Group


def world_group() -> Group:
    """All processes; torch.distributed must be initialised."""
    return Group(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def barrier(group: Group) -> None:
    """Wait for every process of the group."""
    if group.size > 1:
        dist.barrier(group=group.handle)


def gather_objects(value: Any, group: Group) -> list[Any]:
    """Every process's value, in rank order, on every process. For small host objects."""
    if group.size == 1:
        return [value]
    out: list[Any] = [None] * group.size
    dist.all_gather_object(out, value, group=group.handle)
    return out


def broadcast_object(value: Any, group: Group, source: int = 0) -> Any:
    """The value of the process with group rank `source`, on every process."""
    if group.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=group.handle, group_src=source)
    return box[0]


def exchange_objects(outgoing: Mapping[int, Sequence[Any]], group: Group) -> list[Any]:
    """Send objects to the group ranks that they are keyed by, each from its owner to its receiver alone.

    Returns what came in, in the order of its senders. Every process of the group calls it; what does not move costs
    nothing, so this is the way for pixels.
    """
    if group.size == 1:
        return []
    messages = [(rank, _as_bytes(value)) for rank, values in sorted(outgoing.items()) for value in values]
    announced = gather_objects([(rank, len(message)) for rank, message in messages], group)
    incoming = [
        (source, torch.empty(size, dtype=torch.uint8))
        for source, sizes in enumerate(announced)
        for rank, size in sizes
        if rank == group.rank
    ]
    # All are posted before any is waited for; two processes' messages keep their order.
    requests = [dist.irecv(message, group=group.handle, group_src=source) for source, message in incoming]
    requests += [dist.isend(message, group=group.handle, group_dst=rank) for rank, message in messages]
    for request in requests:
        assert request is not None  # this process belongs to the group
        request.wait()
    return [pickle.loads(message.numpy().data) for _, message in incoming]


def _as_bytes(value: Any) -> torch.Tensor:
    """uint8[n], pickled; not copied again."""
    buffer = io.BytesIO()
    pickle.dump(value, buffer, protocol=pickle.HIGHEST_PROTOCOL)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def gather_rows(rows: NDArray[np.float64], group: Group) -> NDArray[np.float64]:
    """Join float64[n_r, C] of every rank into float64[sum n_r, C], in rank order; counts may differ or be 0."""
    if group.size == 1:
        return rows
    counts = torch.zeros(group.size, dtype=torch.int64)
    counts[group.rank] = len(rows)
    dist.all_reduce(counts, group=group.handle)
    longest = int(counts.max())
    mine = torch.zeros(longest, rows.shape[1], dtype=torch.float64)
    mine[: len(rows)] = torch.from_numpy(np.ascontiguousarray(rows))
    out = [torch.empty_like(mine) for _ in range(group.size)]
    dist.all_gather(out, mine, group=group.handle)
    return np.concatenate([part[:count].numpy() for part, count in zip(out, counts.tolist(), strict=True)])


def sum_over(values: NDArray[np.float64], group: Group) -> NDArray[np.float64]:
    """Element-wise sum over the group, float64, added in rank order so that it is the same on every rank and run."""
    if group.size == 1:
        return values
    return gather_rows(values[None], group).sum(axis=0)


def union_over(values: Mapping[str, str], group: Group) -> dict[str, str]:
    """The entries of every process in one dict, the last rank's where a key is on several."""
    return {key: value for part in gather_objects(dict(values), group) for key, value in part.items()}


def agree(ok: bool, group: Group) -> bool:
    """Whether every process of the group says True."""
    return bool(sum_over(np.array([0.0 if ok else 1.0]), group)[0] == 0)
