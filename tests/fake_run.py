"""A made-up run for tests of what a run shows: groups, step statistics and a whole folder of records."""

from __future__ import annotations

import math
import random
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from megatron_vlrl.observe.metrics import MetricsWriter
from megatron_vlrl.observe.records import EvaluationLog, RolloutLog
from megatron_vlrl.types import (
    Mean,
    Message,
    Prompt,
    RewardBreakdown,
    RewardFailure,
    Rollout,
    RolloutGroup,
    Sample,
    ScoredGroup,
    StepStats,
)

TASKS = ("count", "read", "box", "sum", "pick")
HOSTILE = '<script>alert("x")</script></td></table><img src=x onerror=alert(1)>&amp; \x00\udc80 \u202e'


def png(text: str = "3", side: int = 96) -> bytes:
    """A small picture of a text."""
    image = Image.new("L", (side, side), 128)
    ImageDraw.Draw(image).text((side // 3, side // 4), text, fill=245, font_size=side // 3)
    out = BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


PNG = png()


def group(key: str, *, texts: tuple[str, ...], task: str = "count", image: bytes = PNG) -> RolloutGroup:
    """One prompt with an image, and a rollout of two tokens for each text."""
    message = Message(role="user", content="<image>\nHow many digits?")
    sample = Sample(key=key, task=task, messages=(message,), images=(image,), answer="3", position=0)
    empty = np.zeros((0, 4), dtype=np.float32)
    prompt = Prompt(
        sample=sample, token_ids=(1,), positions=np.zeros((3, 1), dtype=np.int64), grids=((1, 0, 0),), patches=(empty,)
    )
    zeros = np.zeros(2, dtype=np.float32)
    rollouts = tuple(
        Rollout(token_ids=(5, 6), log_probs=zeros, temperature=1.0, text=text, finish_reason="stop", weight_version=2)
        for text in texts
    )
    return RolloutGroup(prompt=prompt, rollouts=rollouts)


def rewards(accuracy: float) -> RewardBreakdown:
    """0.9 of the accuracy and 0.1 of a format that was kept."""
    weights = {"accuracy": 0.9, "format": 0.1}
    return RewardBreakdown(
        components={"accuracy": accuracy, "format": 1.0}, weights=weights, total=0.9 * accuracy + 0.1
    )


def stats(
    step: int, *, tasks: tuple[str, ...] = TASKS, grad_norm: float = 1.5, skipped: str | None = None
) -> StepStats:
    """A step of a run that slowly learns; the same numbers for the same step."""
    draw = random.Random(step)
    means = {}
    for number, task in enumerate(tasks):
        accuracy = min(1.0, 0.2 + 0.1 * number + 0.35 * (1 - math.exp(-step / 40)) + draw.gauss(0, 0.04))
        means[f"reward/{task}"] = Mean(total=64 * (0.9 * accuracy + 0.1), count=64)
        means[f"accuracy/{task}"] = Mean(total=64 * accuracy, count=64)
    tokens = 64 * len(tasks)
    for name, value in {
        "response_length": 14 - step / 40,
        "entropy": 0.9 * math.exp(-step / 60),
        "mismatch_kl": 2e-6,
    }.items():
        means[name] = Mean(total=tokens * value * draw.uniform(0.9, 1.1), count=tokens)
    means["clip_fraction"] = Mean(total=draw.uniform(0, 3), count=tokens)
    scalars = {"grad_norm": grad_norm * draw.uniform(0.5, 1.5), "lr": 3e-4 * (1 - step / 200), "mismatch_max": 3e-5}
    if grad_norm >= 3:
        scalars["grad_norm"] = grad_norm
    seconds = {"rollout": 0.7, "reward": 0.003, "score": 0.02, "update": 0.9, "sync": 0.04, "checkpoint": 0.1}
    seconds = {name: value * draw.uniform(0.8, 1.3) for name, value in seconds.items()}
    return StepStats(step=step, means=means, scalars=scalars, seconds=seconds, skipped=skipped)


def write_run(folder: Path, *, steps: int = 120) -> None:
    """A whole run: metrics, evaluations before and after, rollouts every ten steps, one of them hostile, settings."""
    writer = MetricsWriter(folder, tensorboard=False, resume_step=None)
    log, evaluation = RolloutLog(folder, resume_step=None), EvaluationLog(folder, resume_step=None)
    for step in range(steps):
        writer.write(stats(step, skipped="every group is uniform" if step == 4 else None))
        if step % 10 == 0:
            texts = (f"<think>{step}</think>\n<answer>3</answer>", HOSTILE, "<answer>4</answer>", "")
            groups = [
                group(f"{task}-{step}/../<b>", texts=texts, task=task, image=png(str(step))) for task in TASKS[:3]
            ]
            failed = RewardBreakdown(
                components={"format": 0.0},
                weights={},
                total=float("nan"),
                failure=RewardFailure(kind="error", message=HOSTILE),
            )
            each = (rewards(1.0), rewards(0.25), rewards(0.0), failed)
            log.write(
                step, [ScoredGroup(group=one, rewards=each) for one in groups], [np.array([1.2, -0.31, -0.9, 0.0])] * 3
            )
    for step, label, gain in ((0, "before", 0.0), (steps // 2, "during", 0.1), (steps, "after", 0.15)):
        tasks = {
            task: {"accuracy": 0.5 + gain + 0.05 * number, "count": 128, "half_width": 0.085}
            for number, task in enumerate(TASKS)
        }
        evaluation.write(step, label, tasks, 0.0)
        evaluation.write(step, label, {task: {**item, "accuracy": 0.1} for task, item in tasks.items()}, 1.0)
    (folder / "config.yaml").write_text("run:\n  name: <b>fake</b>\ntrain:\n  steps: 120\n", encoding="utf-8")
