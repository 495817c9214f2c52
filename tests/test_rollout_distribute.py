"""Sharing prompts over real gloo ranks gives what one process writes; an error on one rank is an error on all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from megatron_vlrl.errors import RolloutError
from megatron_vlrl.parallel.groups import Group
from megatron_vlrl.rollout.distribute import generate_groups
from megatron_vlrl.rollout.engines.demonstrations import DemonstrationEngine
from megatron_vlrl.types import Message, Prompt, RolloutGroup, Sample, Sampling
from tests.spawn import run_ranks

SAMPLING = Sampling(
    n=3, temperature=1.0, max_new_tokens=6, stop_token_ids=tuple(range(0, 384, 9)), banned_token_ids=(1, 2)
)


def world() -> Group:
    return Group(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def write(folder: Path, prompts: list[Prompt], group: Group | None) -> tuple[list[int], list[RolloutGroup]]:
    """The positions of the prompts that this rank (None: the only one) wrote itself, and all groups."""
    from megatron_vlrl.rollout.engines.transformers import TransformersEngine  # some seconds; not every test needs it

    written: list[int] = []

    class Watched(TransformersEngine):
        def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
            """Notes what was asked for."""
            written.extend(p.sample.position for p in prompts)
            return super().generate(prompts, sampling)

    engine = Watched(folder, decode=str, batch_prompts=8, dtype="float32")
    groups = generate_groups(engine, prompts, SAMPLING, group or Group.single())
    assert all(g.prompt is p for g, p in zip(groups, prompts, strict=True))
    return written, groups


def write_on_rank(folder: Path, prompts: list[Prompt]) -> tuple[list[int], list[RolloutGroup]]:
    return write(folder, prompts, world())


def test_two_ranks_write_what_one_writes(tmp_path: Path) -> None:
    from megatron_vlrl.models.qwen3_vl.render import Renderer
    from tests.tiny import make_tiny, sample

    folder = make_tiny(tmp_path, layers=2, vision_depth=1, deepstack=(0,))
    renderer = Renderer(folder, 512)
    prompts = [renderer.render(sample(position=i, images=i % 3)) for i in range(5)]  # not a multiple of the ranks
    positions, alone = write(folder, prompts, None)
    shares = run_ranks(write_on_rank, 2, folder, prompts)
    assert (positions, [mine for mine, _ in shares]) == ([0, 1, 2, 3, 4], [[0, 2, 4], [1, 3]])
    for _, groups in shares:
        for mine, expected in zip(groups, alone, strict=True):
            assert mine.prompt.sample.key == expected.prompt.sample.key
            for a, b in zip(mine.rollouts, expected.rollouts, strict=True):
                assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
                assert abs(a.log_probs - b.log_probs).max() < 1e-4


class Broken(DemonstrationEngine):
    """Raises on one rank what no engine raises on purpose."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """Fails on rank 1."""
        if world().rank == 1:
            raise ZeroDivisionError("engine fell over")
        return super().generate(prompts, sampling)


def fail_on_rank_1() -> str:
    sample = Sample(
        key="k",
        task="count",
        messages=(Message(role="user", content="?"),),
        images=(),
        answer=5,
        position=0,
        meta={"demonstration": "five"},
    )
    prompt = Prompt(sample=sample, token_ids=(7,), positions=np.zeros((3, 1), dtype=np.int64), grids=(), patches=())
    settings = Sampling(n=1, temperature=1.0, max_new_tokens=4, stop_token_ids=(1,))
    with pytest.raises(RolloutError) as error:
        generate_groups(Broken(lambda text: (5,), str), [prompt] * 3, settings, world())
    assert isinstance(error.value.__cause__, ZeroDivisionError) == (world().rank == 1)
    return str(error.value)


def test_an_error_on_one_rank_raises_on_all_and_names_it() -> None:
    messages = run_ranks(fail_on_rank_1, 2)
    assert messages == ["writing answers failed on rank 1 of 2: ZeroDivisionError: engine fell over"] * 2
