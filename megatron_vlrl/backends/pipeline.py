"""What a pipeline rank keeps at once: its forward and backward steps in their order, counted; torch-free.

In: degrees and the number of microbatches. Out: the moments at which a backward step begins. The order is that of
megatron-core (pipeline_parallel/schedules.py, `get_pp_rank_microbatches` and `get_schedule_table`): after a warm-up of
forward steps alone, one forward and one backward step in turn. Interleaved chunks take turns of as many microbatches as
there are ranks; backward steps go through the chunks the other way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_vlrl.parallel.dims import ParallelDims


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """kept: microbatches of each of the rank's chunks that wait for their backward step. chunk: whose begins now."""

    kept: tuple[int, ...]
    chunk: int


def scheduled(microbatches: int, dims: ParallelDims) -> int:
    """Microbatches with those that fill an interleaved schedule: it takes whole turns."""
    return -(-microbatches // dims.pipeline) * dims.pipeline if dims.virtual > 1 else microbatches


@lru_cache(maxsize=4096)
def moments(dims: ParallelDims, microbatches: int, stage: int) -> tuple[Moment, ...]:
    """The different moments of a step on pipeline rank `stage`, one microbatch at least.

    More than three turns of microbatches repeat what was there before, and are not gone through.
    """
    ranks, chunks = dims.pipeline, dims.virtual
    total = min(scheduled(microbatches, dims), 3 * ranks) * chunks
    ahead = ranks - stage - 1
    warm_up = ahead if chunks == 1 else 2 * ahead + (chunks - 1) * ranks
    turn = ranks if chunks > 1 else 1
    kept, forward = [0] * chunks, 0
    seen: dict[Moment, None] = {}
    for backward in range(total):
        while forward < min(warm_up + backward + 1, total):
            kept[forward // turn % chunks] += 1
            forward += 1
        chunk = chunks - 1 - backward // turn % chunks
        seen[Moment(kept=tuple(kept), chunk=chunk)] = None
        kept[chunk] -= 1
    return tuple(seen)
