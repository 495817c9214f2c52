"""Groups that wait for the next step, as a file of a checkpoint: what was generated and scored is not lost on resume.

Prompts are not stored: a position of the global order makes them again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from megatron_vlrl.errors import CheckpointError
from megatron_vlrl.parallel.collectives import gather_objects
from megatron_vlrl.parallel.groups import Group, ProcessGroups
from megatron_vlrl.types import Prompt, RewardBreakdown, RewardFailure, Rollout, RolloutGroup, ScoredGroup

WAITING_FILE = "waiting_groups.npz"  # in a checkpoint's folder
_ARRAYS = ("token_ids", "log_probs")

Record = dict[str, Any]


def write_waiting(folder: Path, own: Sequence[ScoredGroup], groups: ProcessGroups) -> None:
    """Write the groups of all data ranks, `own` being this one's: one file, no pickle. Every rank calls it.

    No groups anywhere: no file.
    """
    waiting = [record for part in gather_objects([_record(one) for one in own], groups.data) for record in part]
    if not (waiting and groups.is_main):
        return
    rollouts = [rollout for record in waiting for rollout in record["rollouts"]]
    index = [
        record | {"rollouts": [{name: v for name, v in r.items() if name not in _ARRAYS} for r in record["rollouts"]]}
        for record in waiting
    ]
    np.savez(
        folder / WAITING_FILE,
        index=np.frombuffer(json.dumps(index).encode("utf-8"), dtype=np.uint8),
        lengths=np.array([len(rollout["token_ids"]) for rollout in rollouts]),
        token_ids=np.concatenate([np.array(rollout["token_ids"]) for rollout in rollouts]),
        log_probs=np.concatenate([rollout["log_probs"] for rollout in rollouts]),
    )


def read_waiting(folder: Path, prompt_at: Callable[[int], Prompt], data: Group) -> tuple[list[ScoredGroup], list[int]]:
    """(this data rank's groups, every size-th position; the positions of all ranks).

    Raises CheckpointError where the file is not what `write_waiting` writes.
    """
    path = folder / WAITING_FILE
    if not path.exists():
        return [], []
    try:
        with np.load(path, allow_pickle=False) as arrays:
            index = json.loads(arrays["index"].tobytes().decode("utf-8"))
            ends = np.cumsum(arrays["lengths"])[:-1]
            parts = zip(np.split(arrays["token_ids"], ends), np.split(arrays["log_probs"], ends), strict=True)
        rollouts = [[_rollout(raw, *next(parts)) for raw in record["rollouts"]] for record in index]
        own = [
            _group(record, written, prompt_at)
            for record, written in zip(index, rollouts, strict=True)
            if record["position"] % data.size == data.rank
        ]
        return own, [record["position"] for record in index]
    except (OSError, ValueError, KeyError, TypeError, StopIteration, BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); resume from another checkpoint") from error


def _record(one: ScoredGroup) -> Record:
    """What must be stored of a group; small enough to be gathered: no prompt, no pixels."""
    return {
        "position": one.position,
        "rollouts": [{f.name: getattr(rollout, f.name) for f in fields(rollout)} for rollout in one.group.rollouts],
        "rewards": [_of_reward(reward) for reward in one.rewards],
    }


def _group(record: Record, rollouts: Sequence[Rollout], prompt_at: Callable[[int], Prompt]) -> ScoredGroup:
    group = RolloutGroup(prompt=prompt_at(record["position"]), rollouts=tuple(rollouts))
    return ScoredGroup(group=group, rewards=tuple(_reward(raw) for raw in record["rewards"]))


def _rollout(raw: Mapping[str, Any], token_ids: np.ndarray, log_probs: np.ndarray) -> Rollout:
    return Rollout(**raw, token_ids=tuple(token_ids.tolist()), log_probs=log_probs)


def _of_reward(reward: RewardBreakdown) -> Record:
    failure = reward.failure
    return {
        "components": dict(reward.components),
        "weights": dict(reward.weights),
        "total": None if math.isnan(reward.total) else reward.total,
        "failure": None if failure is None else {"kind": failure.kind, "message": failure.message},
    }


def _reward(raw: Mapping[str, Any]) -> RewardBreakdown:
    return RewardBreakdown(
        components=raw["components"],
        weights=raw["weights"],
        total=math.nan if raw["total"] is None else raw["total"],
        failure=None if raw["failure"] is None else RewardFailure(**raw["failure"]),
    )
