"""An answer that is right or wrong: numbers compared by value, texts character by character."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from megatron_vlrl.errors import DataError

# ASCII on purpose: \d would take the digits of other scripts, which only look alike.
_NUMBER = re.compile(r"[+-]?([0-9]{1,3}(,[0-9]{3})+|[0-9]+)(\.[0-9]+)?")


def _number(text: str) -> Decimal | None:
    text = text.strip()
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def number_accuracy(answer: str, gold: Any, meta: Mapping[str, Any]) -> float:
    """1 when the answer is one plain number (sign, thousands commas and decimals allowed) equal to the gold."""
    value = _number(answer)
    return float(value is not None and value == _number(str(gold)))


def check_number(gold: Any) -> None:
    """Gold is a number, or a text that is one."""
    if isinstance(gold, bool) or not isinstance(gold, str | int | float) or _number(str(gold)) is None:
        raise DataError(f'gold answer {gold!r} is not a number; write it as 3, "3" or "-2.5"')


def text_accuracy(answer: str, gold: Any, meta: Mapping[str, Any]) -> float:
    """1 when the answer is the gold text, but for white space around either; case counts."""
    return float(answer.strip() == gold.strip())


def check_text(gold: Any) -> None:
    """Gold is a text that is not empty."""
    if not isinstance(gold, str) or not gold.strip():
        raise DataError(f'gold answer {gold!r} is not a text; write it as a string that is not empty, such as "7"')
