"""One file a task family: how answers are judged; the visible table of tasks."""

from __future__ import annotations

from typing import Any

from megatron_vlrl.config.names import resolve_name
from megatron_vlrl.errors import ConfigError, DataError
from megatron_vlrl.tasks.box import box_accuracy, check_box
from megatron_vlrl.tasks.edit_distance import check_reading, reading_accuracy
from megatron_vlrl.tasks.exact import check_number, check_text, number_accuracy, text_accuracy
from megatron_vlrl.tasks.task import Task

__all__ = ["TASKS", "Task", "resolve"]

TASKS = {
    "count": Task(name="count", accuracy=number_accuracy, check_gold=check_number),
    "read": Task(name="read", accuracy=reading_accuracy, check_gold=check_reading),
    "box": Task(name="box", accuracy=box_accuracy, check_gold=check_box),
    "sum": Task(name="sum", accuracy=number_accuracy, check_gold=check_number),
    "pick": Task(name="pick", accuracy=text_accuracy, check_gold=check_text),
}


def resolve(name: str) -> Task:
    """The task called `name`: one of TASKS, or a user's `package.module:object`.

    The object is a Task, or a function `(answer text, gold, metadata) -> accuracy`, whose gold may then be
    anything but null. Raises ConfigError for an unknown name, with the nearest one, or another kind of object.
    """
    found: object = resolve_name(name, TASKS, "task")
    if isinstance(found, Task):
        return found
    if not callable(found):
        raise ConfigError(f"task {name!r} is a {type(found).__name__}; it must be a Task or an accuracy function")
    return Task(name=name, accuracy=found, check_gold=_check_any)


def _check_any(gold: Any) -> None:
    if gold is None:
        raise DataError("gold answer is null; a task needs something to judge by")
