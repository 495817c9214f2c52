"""The reference policy: a second set of this rank's weights, which the model computes with when it is asked to.

A weight's memory is exchanged, never its content: megatron-core's buffers, the optimizer's views and a gather that is
still on its way keep the policy's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor
from torch import Tensor, nn

from megatron_vlrl.backends.megatron.model import Qwen3VLStage


class Reference:
    """weights: by the parameters' names. moving: they follow the policy, and are kept in float32 whatever its dtype,
    so that a small step is not lost in rounding."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, moving: bool) -> None:
        """Copy the parameters as they are now, on their own device."""
        self.moving = moving
        self._parameters = dict(parameters)
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().to(torch.float32 if moving else parameter.dtype, copy=True)
            for name, parameter in parameters.items()
        }

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The block, without gradient, in which the model has these weights; it has its own again whatever happens.

        Moving weights of a model that is not float32 take its dtype here, in a copy that lives as long as the block.
        """
        own = {name: parameter.data for name, parameter in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                parameter.data = self.weights[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = own[name]

    def move(self, decay: float) -> None:
        """weights = decay * weights + (1 - decay) * policy, as a step of the difference: what is equal stays so."""
        assert self.moving, "a frozen reference does not move: keep_reference(moving=True)"
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                weight = self.weights[name]
                # Each operation rounds by itself, so that no cut of the weight changes a bit (a fused one's tail may).
                weight.add_((parameter.float() - weight).mul_(1.0 - decay))

    def shards(self, chunks: Sequence[Qwen3VLStage]) -> dict[str, Any]:
        """Name -> the weight as a shard of a checkpoint, cut as the parameters of this rank's chunks are."""
        models = {str(number): chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
        places = get_param_id_to_sharded_param_map(models, self._parameters.values())
        return {
            name: make_sharded_optimizer_tensor(places[number], weight, prefix="reference")
            for number, (name, weight) in enumerate(self.weights.items())
        }

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Take what was read into `shards`."""
        for name, weight in self.weights.items():
            weight.copy_(weights[name])
