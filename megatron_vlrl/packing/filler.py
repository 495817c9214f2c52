"""A group without any effect: for a rank, or a place in a pipeline, that must take part and has nothing to compute."""

from __future__ import annotations

import numpy as np

from megatron_vlrl.types import Message, Prompt, Rollout, RolloutGroup, Sample


def filler_group() -> RolloutGroup:
    """One prompt token and one response token, no image. What it is weighted with is the caller's business: 0."""
    sample = Sample(
        key="filler", task="", messages=(Message(role="user", content=""),), images=(), answer=None, position=-1
    )
    prompt = Prompt(sample=sample, token_ids=(0,), positions=np.zeros((3, 1), np.int64), grids=(), patches=())
    rollout = Rollout(
        token_ids=(0,),
        log_probs=np.zeros(1, np.float32),
        temperature=1.0,
        text="",
        finish_reason="stop",
        weight_version=0,
    )
    return RolloutGroup(prompt=prompt, rollouts=(rollout,))
