"""What a person sees while a run goes: StepStats in; one aligned line a step out, and a bar with the time left.

The columns are fixed when the run starts, so that lines align whatever the values are.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from megatron_vlrl.types import StepStats

STAGES = ("rollout", "reward", "score", "update", "sync")
_COLUMNS = (("length", "response_length"), ("entropy", "entropy"), ("KL", "mismatch_kl"), ("grad", "grad_norm"))
_HEADER_EVERY = 20
_WIDTH = 7


def fit(value: float | None, width: int) -> str:
    """Write a number in at most `width` (5 or more) characters, with up to three decimals or an exponent."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 10 ** (width - 1):
        texts = [f"{value:.{decimals}f}" for decimals in (3, 2, 1, 0)]
    else:
        texts = []
        for decimals in (1, 0):
            mantissa, exponent = f"{value:.{decimals}e}".split("e")
            texts.append(f"{mantissa}e{int(exponent)}")
    tiny_or_huge = ("0" if abs(value) < 1 else "huge" if value > 0 else "-huge",)
    return next(text for text in (*texts, *tiny_or_huge) if len(text) <= width)


def _short(task: str, width: int) -> str:
    name = task.rsplit(":", 1)[-1].rsplit(".", 1)[-1]
    return name if len(name) <= width else name[: width - 1] + "~"


class StepLines:
    """Formats the lines of one run.

    Each task has a column "reward/accuracy"; each stage one of seconds, and the stages
    not named in `stages` are summed as "other".
    """

    def __init__(self, total: int, tasks: Sequence[str], stages: Sequence[str] = STAGES) -> None:
        self._total = total
        self._tasks = tuple(tasks)
        self._stages = tuple(stages)
        self._digits = len(str(total))

    def header(self) -> str:
        """The names over the columns; tasks show "reward/accuracy", stages seconds."""
        tasks = [f"{_short(task, 11):^11}" for task in self._tasks]
        numbers = [f"{name:>{_WIDTH}}" for name, _ in _COLUMNS]
        seconds = [f"{_short(stage, _WIDTH):>{_WIDTH}}" for stage in (*self._stages, "other")]
        return self._join("step".rjust(2 * self._digits + 1), tasks, numbers, seconds)

    def legend(self) -> str:
        """What the columns mean; shown once."""
        return "each task: reward/accuracy, means over the step's rollouts; after the last bar: seconds by stage"

    def line(self, stats: StepStats) -> str:
        """One step; a skipped one ends with the reason."""
        flat = stats.flat()
        tasks = []
        for task in self._tasks:
            reward, accuracy = (fit(flat.get(f"{kind}/{task}"), 5) for kind in ("reward", "accuracy"))
            tasks.append(f"{reward:>5}/{accuracy:<5}")
        numbers = [f"{fit(flat.get(name), _WIDTH):>{_WIDTH}}" for _, name in _COLUMNS]
        named = [stats.seconds.get(stage) for stage in self._stages]
        other = sum(value for stage, value in stats.seconds.items() if stage not in self._stages)
        seconds = [f"{fit(value, _WIDTH):>{_WIDTH}}" for value in (*named, other)]
        step = f"{stats.step:>{self._digits}}/{self._total}"
        text = self._join(step, tasks, numbers, seconds)
        return text if stats.skipped is None else f"{text}  skipped: {' '.join(stats.skipped.split())}"

    @staticmethod
    def _join(step: str, *blocks: Sequence[str]) -> str:
        return " | ".join([step, *(" ".join(block) for block in blocks if block)])


class Progress:
    """Writes the lines to `stream`, and a bar to stderr when that is a terminal.

    total: steps of the run. start: steps already done (a resumed run).
    """

    def __init__(self, total: int, tasks: Sequence[str], *, start: int = 0, stream: TextIO | None = None) -> None:
        self._lines = StepLines(total, tasks)
        self._stream = stream or sys.stdout
        self._shown = 0
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, file=sys.stderr)

    def show(self, stats: StepStats) -> None:
        """Write the step's line (every 20 lines under a new header) and move the bar."""
        lines = [self._lines.line(stats)]
        if self._shown % _HEADER_EVERY == 0:
            lines.insert(0, self._lines.header())
        if self._shown == 0:
            lines.insert(0, self._lines.legend())
        self._shown += 1
        if self._bar is not None:
            self._bar.clear()
        self._stream.write("\n".join(lines) + "\n")
        self._stream.flush()
        if self._bar is not None:
            self._bar.update(1)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
