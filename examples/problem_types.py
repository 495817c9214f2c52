"""Simple verifiers for the kinds of question in OneThinker's training data (arXiv 2512.03043, section 3.2), as tasks.

With `PYTHONPATH=examples` a sample's task is `problem_types:ocr`, or another name below. Every answer is judged as the
text between the answer tags; what is not an answer of its kind gets 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from megatron_vlrl.errors import DataError
from megatron_vlrl.tasks.box import box_accuracy, check_box
from megatron_vlrl.tasks.edit_distance import levenshtein
from megatron_vlrl.tasks.exact import check_text
from megatron_vlrl.tasks.task import Task

_LETTER = re.compile(r"\(?([A-Z])([.:)]+(\s.*)?)?", re.DOTALL)  # B, (B), B., B: a text
_NUMBER = re.compile(r"\$?\s*([+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)\s*(?:%|°|[A-Za-z]+)?")
_DIGITS = 24  # more than any answer has, and fewer than Decimal computes with
_DECIMALS = Decimal("0.01")
_MATH_NOISE = re.compile(r"\$|\\left|\\right|\\[,;! ]|\s|\^\{?\\circ\}?|°")
RELATIVE = tuple(Decimal(5 * step) / 100 for step in range(10, 20))  # 0.50, 0.55, ..., 0.95


def _letter(text: str) -> str:
    match = _LETTER.fullmatch(text.strip())
    return match[1] if match else ""


def _number(text: str) -> Decimal | None:
    """One number, thousands commas allowed, with a unit or none."""
    match = _NUMBER.fullmatch(text.strip())
    return Decimal(match[1].replace(",", "")) if match and len(match[1]) <= _DIGITS else None


def letter_accuracy(answer: str, gold: Any, meta: Mapping[str, Any]) -> float:
    """1 for the gold letter, alone or before the option's text."""
    return float(_letter(answer) == _letter(gold))


def number_accuracy(answer: str, gold: Any, meta: Mapping[str, Any]) -> float:
    """1 for a number equal to the gold when both are rounded to two decimals."""
    value, target = _number(answer), _number(str(gold))
    return float(None not in (value, target) and value.quantize(_DECIMALS) == target.quantize(_DECIMALS))


def regression_accuracy(answer: str, gold: Any, meta: Mapping[str, Any]) -> float:
    """Mean relative accuracy: the share of the thresholds t in RELATIVE with |answer - gold| / |gold| < 1 - t."""
    value, target = _number(answer), _number(str(gold))
    if value is None or target is None:
        return 0.0
    if target == 0:
        return float(value == 0)
    error = abs(value - target) / abs(target)
    return sum(error < 1 - threshold for threshold in RELATIVE) / len(RELATIVE)


def math_accuracy(answer: str, gold: Any, meta: Mapping[str, Any]) -> float:
    """1 for an equal number, or the same expression but for dollars, blanks and degree signs; nothing is simplified."""
    value, target = (_MATH_NOISE.sub("", text) for text in (answer, str(gold)))
    numbers = _number(value), _number(target)
    return float(value == target or (None not in numbers and numbers[0] == numbers[1]))


def ocr_accuracy(answer: str, gold: Any, meta: Mapping[str, Any]) -> float:
    """1 less the word error rate, and not below 0."""
    words, target = answer.split(), gold.split()
    letters = {word: chr(number) for number, word in enumerate(dict.fromkeys([*words, *target]))}  # a word as one
    edits = levenshtein("".join(map(letters.get, words)), "".join(map(letters.get, target)))
    return max(0.0, 1.0 - edits / len(target))


def grounding_accuracy(answer: str, gold: Any, meta: Mapping[str, Any]) -> float:
    """Intersection over union of `{"boxes": [left, top, right, bottom]}` with the gold box, a list of the four."""
    try:
        items = json.loads(answer, object_pairs_hook=tuple, parse_int=float)
    except (ValueError, RecursionError):
        return 0.0
    alone = isinstance(items, tuple) and [name for name, _ in items] == ["boxes"]
    return box_accuracy(json.dumps(items[0][1]), gold, meta) if alone else 0.0


def check_letter(gold: Any) -> None:
    """Gold is a letter."""
    if not isinstance(gold, str) or not _letter(gold):
        raise DataError(f'gold answer {gold!r} is not a letter; write "B"')


def check_number(gold: Any) -> None:
    """Gold is a number, or a text that is one."""
    if isinstance(gold, bool) or not isinstance(gold, str | int | float) or _number(str(gold)) is None:
        raise DataError(f'gold answer {gold!r} is not a number; write it as 3, "3" or "-2.5"')


multiple_choice = Task(name="multiple_choice", accuracy=letter_accuracy, check_gold=check_letter)
numerical = Task(name="numerical", accuracy=number_accuracy, check_gold=check_number)
regression = Task(name="regression", accuracy=regression_accuracy, check_gold=check_number)
math = Task(name="math", accuracy=math_accuracy, check_gold=check_text)
ocr = Task(name="ocr", accuracy=ocr_accuracy, check_gold=check_text)
grounding = Task(name="grounding", accuracy=grounding_accuracy, check_gold=check_box)

# As OneThinker's data calls them.
PROBLEM_TYPES = {
    "multiple choice": multiple_choice,
    "numerical": numerical,
    "regression": regression,
    "math": math,
    "OCR": ocr,
    "spatial grounding": grounding,
}
