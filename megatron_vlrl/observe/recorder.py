"""Everything that a run writes for people, behind one object; for rank 0 alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_vlrl.config.schema import ObserveConfig
from megatron_vlrl.observe.metrics import MetricsWriter
from megatron_vlrl.observe.progress import Progress
from megatron_vlrl.observe.records import EvaluationLog, RolloutLog
from megatron_vlrl.types import ScoredGroup, StepStats


class Recorder:
    """metrics.jsonl, TensorBoard, evaluation.jsonl, rollouts.jsonl and the lines on the screen.

    step: steps done so far; 0 starts the files anew, more cuts away what a crashed run wrote after it.
    """

    def __init__(self, folder: Path, config: ObserveConfig, *, tasks: Sequence[str], total: int, step: int) -> None:
        resume = step + 1 if step else None
        self._config = config
        self._metrics = MetricsWriter(folder, tensorboard=config.tensorboard, resume_step=resume)
        self._evaluations = EvaluationLog(folder, resume_step=resume)
        self._rollouts = RolloutLog(folder, resume_step=resume)
        self._progress = Progress(total, tasks, start=step) if config.progress else None

    def step(self, stats: StepStats) -> None:
        """Write one step."""
        self._metrics.write(stats)
        if self._progress is not None:
            self._progress.show(stats)

    def rollouts(
        self,
        step: int,
        groups: Sequence[ScoredGroup],
        advantages: Sequence[NDArray[np.float64]],
    ) -> None:
        """Keep the first groups of every `rollouts_every`-th step, and of the first."""
        every = self._config.rollouts_every
        if step == 1 or (every and step % every == 0):
            kept = self._config.rollouts_kept
            self._rollouts.write(step, groups[:kept], advantages[:kept])

    def evaluation(self, step: int, label: str, tasks: Mapping[str, Mapping[str, float]], temperature: float) -> None:
        """Write one evaluation."""
        self._evaluations.write(step, label, tasks, temperature)

    def close(self) -> None:
        """Finish the files and the bar."""
        self._metrics.close()
        if self._progress is not None:
            self._progress.close()
