"""Samples -> prompts, with bad ones skipped, named and counted; and the fixed samples of an evaluation.

In: a SampleStream and a function that renders a Sample. Out: Prompts of this rank.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_vlrl.data.stream import SampleStream, ShardReader
from megatron_vlrl.errors import DataError, SampleError
from megatron_vlrl.types import Prompt, Sample

_log = logging.getLogger(__name__)


class PromptLoader:
    """Draws, renders and keeps count of what could not be used.

    A bad sample is not replaced: the step has one prompt less. A replacement would have to be drawn from later
    positions, so the positions of every later step would depend on which rank met which bad sample, and another
    layout would train on other data. `max_bad` is the number of different keys this rank may skip.
    """

    def __init__(self, stream: SampleStream, render: Callable[[Sample], Prompt], max_bad: int) -> None:
        self._stream = stream
        self._render = render
        self._max_bad = max_bad
        self.bad: dict[str, str] = {}

    def next(self, count: int) -> list[Prompt]:
        """Prompts of this rank among the next `count` global positions, in order; may be fewer, or none.

        Raises DataError with a summary once more than `max_bad` samples were skipped.
        """
        prompts = [self._prompt(item) for item in self._stream.next(count)]
        if len(self.bad) > self._max_bad:
            raise DataError(self._summary())
        return [prompt for prompt in prompts if prompt is not None]

    def state(self) -> dict[str, Any]:
        """JSON-like: the stream's state and the samples skipped so far."""
        return {"stream": self._stream.state(), "bad": dict(self.bad)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; raises as SampleStream.restore does."""
        self._stream.restore(state["stream"])
        self.bad = dict(state["bad"])

    def _prompt(self, item: Sample | SampleError) -> Prompt | None:
        try:
            if isinstance(item, SampleError):
                raise item
            return self._render(item)
        except SampleError as error:
            if error.key not in self.bad:
                _log.warning("skipped sample %s: %s", error.key, error.reason)
            self.bad[error.key] = error.reason
            return None

    def _summary(self) -> str:
        lines = [f"  {key}: {reason}" for key, reason in list(self.bad.items())[:5]]
        more = [f"  and {len(self.bad) - 5} more, each logged when it was skipped"] if len(self.bad) > 5 else []
        head = f"{len(self.bad)} samples could not be used, more than data.max_bad_samples={self._max_bad} allows:"
        return "\n".join([head, *lines, *more, "mend or remove them and prepare the shards again, or raise the limit"])


def held_out(folder: Path, per_task: int) -> list[Sample]:
    """The first `per_task` samples of each task, in the order they were prepared; `position` is their number there.

    A damaged one raises its SampleError: an evaluation that skips items measures something else.
    """
    reader = ShardReader(folder)
    taken: Counter[int] = Counter()
    samples = []
    for number, task in enumerate(reader.index.task.tolist()):
        if taken[task] < per_task:
            taken[task] += 1
            samples.append(reader.read(number, number))
    return samples
