"""Small groups of rollouts without a model, for tests of what happens to them between sampling and the update."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_vlrl.types import Message, Prompt, Rollout, RolloutGroup, Sample


def make_group(
    position: int, lengths: Sequence[int], *, prompt: int = 4, task: str = "count", grids: Sequence[int] = ()
) -> RolloutGroup:
    """A prompt of `prompt` random tokens whose MRoPE positions end above their number, and responses of `lengths`.

    grids: side in patches of each (square) image; patches are 8 numbers each.
    """
    random = np.random.default_rng([position, prompt, *lengths])
    patches = tuple(random.standard_normal((side * side, 8)).astype(np.float32) for side in grids)
    return RolloutGroup(
        prompt=Prompt(
            sample=Sample(
                key=f"{task}-{position}",
                task=task,
                messages=(Message(role="user", content="?"),),
                images=(b"",) * len(grids),
                answer=None,
                position=position,
            ),
            token_ids=tuple(random.integers(1, 300, prompt).tolist()),
            positions=np.sort(random.integers(0, 3 * prompt, (3, prompt)), axis=1),
            grids=tuple((1, side, side) for side in grids),
            patches=patches,
        ),
        rollouts=tuple(make_rollout(random.integers(1, 300, length).tolist()) for length in lengths),
    )


def make_rollout(token_ids: Sequence[int]) -> Rollout:
    """A response whose sampler's log-probs are all -1."""
    return Rollout(
        token_ids=tuple(token_ids),
        log_probs=-np.ones(len(token_ids), np.float32),
        temperature=1.0,
        text="",
        finish_reason="stop",
        weight_version=0,
    )
