"""What a task is to the trainer: how an answer is judged and how its gold is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# (answer text, gold, the sample's metadata) -> accuracy in [0, 1]
Accuracy = Callable[[str, Any, Mapping[str, Any]], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One kind of question.

    accuracy: of the text between the answer tags, as the model wrote it. It never evaluates that text, and
    gives 0 for whatever is not an answer; an exception means that the verifier failed, not that the model did.
    check_gold: raises DataError, saying what a gold answer must be, where one could not be judged against.
    """

    name: str
    accuracy: Accuracy
    check_gold: Callable[[Any], None]
