"""A text read from the image, credited by how few single-character edits turn it into the gold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_vlrl.errors import DataError


def levenshtein(a: str, b: str) -> int:
    """The least number of insertions, deletions and substitutions of one character that turn `a` into `b`."""
    row = list(range(len(b) + 1))  # distance of the part of `a` read so far to each beginning of `b`
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def reading_accuracy(answer: str, gold: Any, meta: Mapping[str, Any]) -> float:
    """1 - edit distance / length of the longer text; white space around either does not count."""
    answer, gold = answer.strip(), gold.strip()
    return 1.0 - levenshtein(answer, gold) / max(len(answer), len(gold))


def check_reading(gold: Any) -> None:
    """Gold is a text that is not empty."""
    if not isinstance(gold, str) or not gold.strip():
        raise DataError(f'gold answer {gold!r} is not a text to read; write it as a string that is not empty: "407"')
