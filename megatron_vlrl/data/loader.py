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
    layout would train on other data. bad: key -> reason, of what this rank has skipped.
    """

    def __init__(self, stream: SampleStream, render: Callable[[Sample], Prompt]) -> None:
        self._stream = stream
        self._render = render
        self.bad: dict[str, str] = {}

    def next(self, count: int) -> list[Prompt]:
        """Prompts of this rank among the next `count` global positions, in order; may be fewer, or none."""
        prompts = [self._prompt(item) for item in self._stream.next(count)]
        return [prompt for prompt in prompts if prompt is not None]

    def at(self, position: int) -> Prompt:
        """The prompt of a position that was drawn before, on any rank; the cursor stays. Raises SampleError."""
        return self._render(self._stream.at(position))

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


def check_bad_samples(bad: Mapping[str, str], limit: int) -> None:
    """Raise DataError with a summary where more samples were skipped than `limit`; `bad` is that of all ranks."""
    if len(bad) <= limit:
        return
    lines = [f"  {key}: {reason}" for key, reason in list(bad.items())[:5]]
    more = [f"  and {len(bad) - 5} more, each logged when it was skipped"] if len(bad) > 5 else []
    head = f"{len(bad)} samples could not be used, more than data.max_bad_samples={limit} allows:"
    fix = "mend or remove them and prepare the shards again, or raise the limit"
    raise DataError("\n".join([head, *lines, *more, fix]))


def held_out(where: str | Path, per_task: int) -> list[Sample]:
    """The first `per_task` samples of each task, in the order they were prepared; `position` is their number there.

    A damaged one raises its SampleError: an evaluation that skips items measures something else.
    """
    reader = ShardReader(where)
    taken: Counter[int] = Counter()
    samples = []
    for number, task in enumerate(reader.index.task.tolist()):
        if taken[task] < per_task:
            taken[task] += 1
            samples.append(reader.read(number, number))
    return samples
