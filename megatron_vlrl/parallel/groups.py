"""Process groups as values: built once, complete, passed to whoever needs them; never global, never None."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_vlrl.parallel.dims import ParallelDims

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class Group:
    """Some processes, and this one's place. A group of one needs no handle: its collectives are the identity."""

    rank: int
    size: int
    handle: ProcessGroup | None

    @classmethod
    def single(cls) -> Group:
        """This process alone."""
        return cls(0, 1, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessGroups:
    """tensor, pipeline: this replica's. data: the same shard of every replica. model: one replica, tensor x pipeline.
    expert: the data ranks that hold all experts together; each of them holds a part.

    Data ranks see different prompts; ranks of one `model` group see the same.
    """

    dims: ParallelDims
    world: Group
    tensor: Group
    pipeline: Group
    data: Group
    model: Group
    expert: Group

    @classmethod
    def single(cls) -> ProcessGroups:
        """One process, no parallelism."""
        one = Group.single()
        return cls(dims=ParallelDims(), world=one, tensor=one, pipeline=one, data=one, model=one, expert=one)

    @classmethod
    def replicas(cls, world: Group) -> ProcessGroups:
        """Every process holds the whole model: they differ in data alone."""
        one = Group.single()
        dims = ParallelDims(data=world.size)
        return cls(dims=dims, world=world, tensor=one, pipeline=one, data=world, model=one, expert=one)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.world.rank == 0
