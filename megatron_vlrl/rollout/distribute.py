"""Shares the writing of a replica's prompts among its ranks, and brings the answers together on all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_vlrl.errors import RolloutError, VLRLError
from megatron_vlrl.parallel.collectives import gather_objects
from megatron_vlrl.parallel.groups import Group
from megatron_vlrl.rollout.engine import Engine
from megatron_vlrl.types import Prompt, RolloutGroup, Sampling

T = TypeVar("T")
log = logging.getLogger(__name__)


def generate_groups(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, model_group: Group
) -> list[RolloutGroup]:
    """All groups, in the order of `prompts`, on every rank of the replica; each rank writes every size-th prompt.

    `prompts` must be the same on all ranks of the group. Answers travel, pixels do not. An error on one rank raises
    RolloutError on all of them, naming it.
    """
    own = prompts[model_group.rank :: model_group.size]
    shares = gather_all(lambda: [g.rollouts for g in engine.generate(own, sampling)], model_group, "writing answers")
    return [
        RolloutGroup(prompt=prompt, rollouts=shares[i % model_group.size][i // model_group.size])
        for i, prompt in enumerate(prompts)
    ]


def gather_all(work: Callable[[], T], group: Group, doing: str) -> list[T]:
    """What `work` returns on each rank, in rank order, on every rank; if it raises on any, RolloutError on all.

    A rank that failed alone would leave the others waiting in their next collective until it times out.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:  # the border to the engine: whatever it raises must reach all ranks
        failure = error
        if not isinstance(error, VLRLError):  # not foreseen: the message alone will not find it
            log.exception("%s failed", doing)
    message = f"{type(failure).__name__}: {failure}" if failure else None
    answers = gather_objects((message, result), group)
    failed = [f"rank {rank} of {group.size}: {message}" for rank, (message, _) in enumerate(answers) if message]
    if failed:
        raise RolloutError(f"{doing} failed on {'; '.join(failed)}") from failure
    return [answer for _, answer in answers]
