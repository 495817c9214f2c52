"""What a run said and how well it did: rollouts with their images, and accuracies on held-out items.

In: groups with their rewards and advantages, or accuracies by task. Out: rollouts.jsonl with the images
as files beside it, evaluation.jsonl; and readers for both. One process of a run writes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vlrl.observe import jsonl
from megatron_vlrl.types import RewardBreakdown, Rollout, Sample, ScoredGroup

ROLLOUTS_FILE = "rollouts.jsonl"
IMAGES_FOLDER = "rollouts"
EVALUATION_FILE = "evaluation.jsonl"
_MAX_NAME = 80
_SIGNATURES = ((b"\x89PNG", 0, "png"), (b"\xff\xd8\xff", 0, "jpg"), (b"WEBP", 8, "webp"))


def image_suffix(data: bytes) -> str:
    """Tell png, jpg or webp by the first bytes; "bin" for anything else."""
    return next((name for mark, at, name in _SIGNATURES if data[at : at + len(mark)] == mark), "bin")


def file_name(key: str) -> str:
    """A key as a file name: itself where that is safe, else its safe characters and a hash, so that keys stay apart."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", key).lstrip(".")[:_MAX_NAME]
    if key and safe == key:
        return key
    return f"{safe}-{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


class RolloutLog:
    """Appends groups to `folder`/rollouts.jsonl; their images go to `folder`/rollouts/ as they were encoded.

    resume_step: as for MetricsWriter: records of that step or later are cut away; None: a new run.
    """

    def __init__(self, folder: Path, *, resume_step: int | None) -> None:
        (folder / IMAGES_FOLDER).mkdir(parents=True, exist_ok=True)
        self._folder = folder
        jsonl.restart(folder / ROLLOUTS_FILE, resume_step)

    def write(
        self,
        step: int,
        groups: Sequence[ScoredGroup],
        advantages: Sequence[NDArray[np.float64]],
    ) -> None:
        """One line a group; advantages hold one entry for each of its rollouts, in their order."""
        for one, group_advantages in zip(groups, advantages, strict=True):
            sample = one.group.prompt.sample
            rows = zip(one.group.rollouts, one.rewards, group_advantages, strict=True)
            record = {
                "step": step,
                "key": sample.key,
                "task": sample.task,
                "prompt": [{"role": message.role, "content": message.content} for message in sample.messages],
                "answer": sample.answer,
                "images": self._save_images(sample),
                "rollouts": [_rollout_record(*row) for row in rows],
            }
            jsonl.append(self._folder / ROLLOUTS_FILE, record)

    def _save_images(self, sample: Sample) -> list[str]:
        names = []
        for number, data in enumerate(sample.images):
            name = f"{IMAGES_FOLDER}/{file_name(sample.key)}-{number}.{image_suffix(data)}"
            (self._folder / name).write_bytes(data)
            names.append(name)
        return names


def _rollout_record(rollout: Rollout, reward: RewardBreakdown, advantage: float) -> dict[str, Any]:
    failure = reward.failure
    return {
        "text": rollout.text,
        "tokens": len(rollout.token_ids),
        "finish_reason": rollout.finish_reason,
        "weight_version": rollout.weight_version,
        "total": reward.total,
        "components": dict(reward.components),
        "weights": dict(reward.weights),
        "failure": None if failure is None else {"kind": failure.kind, "message": failure.message},
        "advantage": advantage,
    }


class EvaluationLog:
    """Appends evaluations to `folder`/evaluation.jsonl; `resume_step` as for RolloutLog."""

    def __init__(self, folder: Path, *, resume_step: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / EVALUATION_FILE
        jsonl.restart(self._path, resume_step)

    def write(self, step: int, label: str, tasks: Mapping[str, Mapping[str, float]], temperature: float) -> None:
        """One line. step: optimizer steps taken. label: "before", "during" or "after" training. temperature 0: greedy.

        tasks: by name, "accuracy" (0 to 1), "count" of items, "half_width" of the 95% interval.
        """
        jsonl.append(self._path, {"step": step, "label": label, "temperature": temperature, "tasks": tasks})


def read_rollouts(folder: Path) -> list[dict[str, Any]]:
    """The groups of `folder`/rollouts.jsonl; "images" are paths relative to `folder`."""
    return jsonl.read(folder / ROLLOUTS_FILE)


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The records of `folder`/evaluation.jsonl."""
    return jsonl.read(folder / EVALUATION_FILE)
