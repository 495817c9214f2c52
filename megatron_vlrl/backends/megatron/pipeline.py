"""How pipeline stages hand tensors of varying shape to each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

_DIMENSIONS = 3  # [T, 1, width]


class VaryingShapeP2P(P2PCommunicator):
    """megatron-core's messages between stages, each led by its shape, and all sent before any is waited for.

    Its own way (p2p_communication.py:165, 301) exchanges the shapes of every tensor of a call first. Interleaved stages
    then wait for each other for ever: a rank in its warm-up waits for a tensor, which the other sends only after it has
    the shape of a gradient that the first will send after its warm-up. And its shapes of both directions go in one
    batch: at pipeline 2, where the previous and the next stage are the same rank, they arrive swapped.
    Here forward and backward have a process group each, so that messages of one direction keep their order.
    """

    def __init__(self, forward: dist.ProcessGroup, backward: dist.ProcessGroup, config: ModelParallelConfig) -> None:
        super().__init__(forward, config)
        self._forward, self._backward = forward, backward

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, None]:
        """(from the previous stage, from the next stage, nothing left to wait for)."""
        assert wait_on_reqs, "overlapped messages would need shapes that are known beforehand"
        requests = self._send(tensor_send_next, self.next_rank, self._forward)
        requests += self._send(tensor_send_prev, self.prev_rank, self._backward)
        from_prev = self._receive(self.prev_rank, self._forward) if recv_prev else None
        from_next = self._receive(self.next_rank, self._backward) if recv_next else None
        for request in requests:
            request.wait()
        return from_prev, from_next, None

    def _send(self, tensor: Tensor | None, rank: int | None, group: dist.ProcessGroup) -> list[Any]:
        if tensor is None:
            return []
        shape = torch.tensor(tensor.size(), dtype=torch.int64, device=tensor.device)
        return [dist.isend(shape, rank, group), dist.isend(tensor.contiguous(), rank, group)]

    def _receive(self, rank: int | None, group: dist.ProcessGroup) -> Tensor:
        device = torch.cuda.current_device()
        shape = torch.empty(_DIMENSIONS, dtype=torch.int64, device=device)
        dist.recv(shape, rank, group)
        tensor = torch.empty(shape.tolist(), dtype=self.config.pipeline_dtype, device=device, requires_grad=True)
        dist.recv(tensor, rank, group)
        return tensor


def backward_group(forward: dist.ProcessGroup) -> dist.ProcessGroup:
    """A second group of the same processes; every process of the job calls it."""
    mine = dist.get_process_group_ranks(forward)
    everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    pipelines = sorted({tuple(ranks) for ranks in everyone})
    group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in pipelines])
    assert group is not None
    return group
