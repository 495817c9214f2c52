"""What a pipeline rank keeps at once follows from megatron-core's own order of steps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_vlrl.backends.pipeline import Moment, moments, scheduled
from megatron_vlrl.parallel.dims import ParallelDims

PIPELINES = [(1, 1), (2, 1), (4, 1), (2, 2), (2, 3), (3, 2), (4, 2), (4, 4), (8, 2)]


def moments_of_megatron(dims: ParallelDims, microbatches: int, stage: int) -> list[Moment]:
    """Every moment of the step, from megatron-core's functions: which chunk each step is of, how long the warm-up."""
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    group = SimpleNamespace(size=lambda: dims.pipeline, rank=lambda: stage)
    virtual = dims.virtual if dims.virtual > 1 else None
    total, _, warm_up, _ = get_pp_rank_microbatches(
        microbatches,
        dims.virtual,
        dims.pipeline,
        p2p_communicator=SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual),
    )
    chunks = [chunk for _, chunk in get_schedule_table(microbatches, dims.virtual, dims.pipeline)]
    found = []
    for done in range(total):
        back = [dims.virtual - 1 - chunk for chunk in chunks[: done + 1]]
        ahead = chunks[: min(total, warm_up + done + 1)]
        kept = tuple(ahead.count(n) - back[:done].count(n) for n in range(dims.virtual))
        found.append(Moment(kept=kept, chunk=back[done]))
    return found


@pytest.mark.parametrize("turns", [1, 2, 3, 5])
@pytest.mark.parametrize(("pipeline", "virtual"), PIPELINES)
def test_moments_are_those_of_megatron_core(pipeline: int, virtual: int, turns: int) -> None:
    dims = ParallelDims(pipeline=pipeline, virtual=virtual)
    microbatches = turns * pipeline if virtual > 1 else turns
    for stage in range(pipeline):
        expected = moments_of_megatron(dims, microbatches, stage)
        found = moments(dims, microbatches, stage)
        assert len(found) == len(set(found))
        assert set(found) <= set(expected)
        for moment in expected:  # none that keeps more was left out
            assert any(
                moment.chunk == other.chunk and all(a <= b for a, b in zip(moment.kept, other.kept, strict=True))
                for other in found
            )


def test_plain_pipeline_keeps_a_row_for_each_stage_still_to_come() -> None:
    dims = ParallelDims(pipeline=4)
    assert [max(moment.kept for moment in moments(dims, 8, stage)) for stage in range(4)] == [(4,), (3,), (2,), (1,)]
    assert [max(moment.kept for moment in moments(dims, 2, stage)) for stage in range(4)] == [(2,), (2,), (2,), (1,)]


def test_interleaved_first_rank_keeps_more_of_its_first_chunk() -> None:
    kept = [moment.kept for moment in moments(ParallelDims(pipeline=4, virtual=2), 16, 0)]
    assert max(sum(rows) for rows in kept) == 11  # of half as many layers: 5.5 rows where a plain pipeline keeps 4
    assert max(first for first, _ in kept) == 8


def test_interleaved_schedule_takes_whole_turns() -> None:
    assert [scheduled(n, ParallelDims(pipeline=4, virtual=2)) for n in (1, 4, 5)] == [4, 4, 8]
    assert scheduled(5, ParallelDims(pipeline=4)) == 5
    assert moments(ParallelDims(pipeline=4, virtual=2), 1, 0) == moments(ParallelDims(pipeline=4, virtual=2), 4, 0)
