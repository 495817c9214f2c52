"""The text of a response in, its thinking and its answer out: the format that every task asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_FORMAT = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What stood between the tags, character by character as it was written."""

    thinking: str
    text: str


def parse_answer(text: str) -> Answer | None:
    """Read `<think>...</think><answer>...</answer>`; None for anything else.

    Each tag stands exactly once, in this order, with nothing but white space around the two pairs. So an answer
    in the thinking part, a second answer, or text after the answer leaves the response without an answer at all.
    """
    if any(text.count(tag) != 1 for tag in TAGS):
        return None
    match = _FORMAT.fullmatch(text)
    return Answer(thinking=match[1], text=match[2]) if match else None
