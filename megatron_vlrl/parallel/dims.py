"""Degrees of parallelism as data: torch-free, checked, and printed with every factor when they do not fit."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vlrl.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelDims:
    """tensor x pipeline x data = world. `sequence` splits the token axis over the tensor group.

    expert: data ranks that share the experts of a mixture of experts; each holds a part of them, cut over its tensor
    group as other layers are. virtual: chunks of layers on each pipeline rank; a model has pipeline x virtual stages.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    expert: int = 1
    virtual: int = 1

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "data", "expert", "virtual"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name} is {getattr(self, name)}; a degree is 1 or more")
        if self.data % self.expert:
            raise ConfigError(
                f"parallel.expert={self.expert} does not divide parallel.data={self.data}; experts are shared by "
                "data ranks, so use a divisor"
            )

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.tensor * self.pipeline * self.data

    @property
    def product(self) -> str:
        """Every factor, for messages."""
        return f"tensor {self.tensor} x pipeline {self.pipeline} x data {self.data} = {self.world}"

    def check_world(self, world: int) -> None:
        """Raise ConfigError unless the degrees multiply out to the number of processes."""
        if world != self.world:
            raise ConfigError(
                f"{self.product}, but {world} processes were started; "
                f"start {self.world} or change one of parallel.tensor, parallel.pipeline, parallel.data"
            )
