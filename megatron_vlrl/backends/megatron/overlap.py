"""Gradients are summed over the data ranks while the backward pass goes on, parameters gathered in the next forward.

In: megatron-core's buckets of parameters. megatron-core starts a bucket's reduction when each of its gradients has
come as often as in the first step; a bucket some of whose parameters took no part, as the vision tower's in a row
without images, would never start, or start in another order than on the other data ranks, which pairs up the wrong
buckets. Here buckets start in one fixed order, as in torch's own DistributedDataParallel, and what is left starts when
the backward pass is over. Parameters are gathered in a fixed order too, all asked for when the update is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import nn


class Overlap:
    """The buckets of a rank's chunks, in the order in which every data rank reduces them."""

    def __init__(self, wrapped: Sequence[DistributedDataParallel], *, gather: bool) -> None:
        """gather: whether the optimizer is distributed, so that parameters come back by a gather; collective then."""
        self._wrapped = list(wrapped)
        # The backward pass ends with the first chunk.
        self._buckets = [
            bucket
            for chunk in reversed(self._wrapped)
            for bucket in chunk.bucket_groups + chunk.expert_parallel_bucket_groups
        ]
        self._gather = gather
        for bucket in self._buckets:
            bucket.is_first_batch = False  # its own counting of gradients is not used
            bucket.register_grad_ready = partial(self._ready, bucket)
        self._begin()
        for chunk in self._wrapped if gather else ():
            chunk.start_param_sync(force_sync=True)

    def start_rest(self) -> None:
        """Start what the backward pass did not complete; megatron-core may then wait for all.

        Before the weights change, modules that took no part in the step get the last update's, too.
        """
        self.wait_for_parameters()
        for bucket in self._buckets[self._started :]:
            bucket.start_grad_sync()
        self._begin()

    def gather_parameters(self) -> None:
        """Ask for the updated parameters of the other data ranks; modules wait for theirs when they are called."""
        for chunk in self._wrapped if self._gather else ():
            chunk.start_param_sync()

    def wait_for_parameters(self) -> None:
        """Before parameters are read outside of their module's call."""
        for bucket in self._buckets if self._gather else ():
            bucket.finish_param_sync(skip_next_bucket_dispatch=True)

    def _begin(self) -> None:
        self._missing: list[set[nn.Parameter]] = [set(bucket.params) for bucket in self._buckets]
        self._started = 0

    def _ready(self, bucket: Any, parameter: nn.Parameter, _force_all_reduce: bool = False) -> None:
        """Called for each gradient; in the last microbatch it is complete."""
        if not bucket.is_last_microbatch:
            return
        index = self._buckets.index(bucket)
        assert index >= self._started, "a gradient came after its bucket was reduced"
        self._missing[index].discard(parameter)
        while self._started < len(self._buckets) and not self._missing[self._started]:
            self._buckets[self._started].start_grad_sync()
            self._started += 1
