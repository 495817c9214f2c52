"""What a step measured, kept: StepStats in; metrics.jsonl and TensorBoard events out.

One process of a run writes. A resumed run first cuts away what a crashed one wrote after its last
checkpoint, so that its file equals that of a run never interrupted, but for "time" and "seconds/...".
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vlrl.observe import jsonl
from megatron_vlrl.types import StepStats

_log = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsWriter:
    """Appends one record a step to `folder`/metrics.jsonl, and to TensorBoard if asked.

    resume_step: the first step that will be written; older records of that step or later are cut away.
    None: a new run, which starts an empty file.
    """

    def __init__(self, folder: Path, *, tensorboard: bool, resume_step: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / METRICS_FILE
        jsonl.restart(self._path, resume_step)
        self._events = _open_events(folder / TENSORBOARD_FOLDER, resume_step or 0) if tensorboard else None

    def write(self, stats: StepStats) -> None:
        """One line: step, time (Unix seconds), why it was skipped or null, every metric, and "counts" of the means."""
        now = time.time()
        flat = stats.flat()
        head = {"step": stats.step, "time": round(now, 3), "skipped": stats.skipped}
        counts = {name: mean.count for name, mean in stats.means.items()}
        jsonl.append(self._path, {**head, **flat, "counts": counts})
        if self._events is not None:
            self._events.write(stats.step, now, flat)

    def close(self) -> None:
        """Close the TensorBoard file; metrics.jsonl is complete after every write."""
        if self._events is not None:
            self._events.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of `folder`/metrics.jsonl in order; a value that was not finite is None."""
    return jsonl.read(folder / METRICS_FILE)


class _Events:
    """TensorBoard's own event writer, which needs neither torch nor TensorFlow."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder))
        # A START event makes readers forget what earlier files of the folder say about this step and later ones.
        session = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=purge_step, session_log=session))

    def write(self, step: int, now: float, values: Mapping[str, float]) -> None:
        summary = self._summary(value=[self._summary.Value(tag=name, simple_value=v) for name, v in values.items()])
        self._writer.add_event(self._event(wall_time=now, step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _open_events(folder: Path, purge_step: int) -> _Events | None:
    try:
        return _Events(folder, purge_step)
    except ImportError as error:
        _log.warning(
            "no TensorBoard events: %s; install tensorboard or set observe.tensorboard=false; metrics.jsonl has it all",
            error,
        )
        return None
