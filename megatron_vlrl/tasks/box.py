"""A box in the image, credited by its overlap with the gold box."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from megatron_vlrl.errors import DataError

Box = tuple[float, float, float, float]


def _box(value: Any) -> Box | None:
    """`value` as a box: a list of four numbers with 0 <= left < right and 0 <= top < bottom, all finite."""
    if not isinstance(value, list) or len(value) != 4 or not all(type(v) in (int, float) for v in value):
        return None
    left, top, right, bottom = value
    inside = 0 <= left < right < math.inf and 0 <= top < bottom < math.inf  # refuses NaN as well
    return (left, top, right, bottom) if inside else None


def parse_box(answer: str) -> Box | None:
    """Read `[left, top, right, bottom]`, strict JSON and nothing else; None for whatever is not a box."""
    try:
        # Numbers as float: an integer of a thousand digits becomes infinite, not an error later on.
        return _box(json.loads(answer, parse_int=float))
    except (ValueError, RecursionError):  # RecursionError: thousands of nested brackets
        return None


def intersection_over_union(a: Box, b: Box) -> float:
    """Area that both boxes cover / area that either covers, in [0, 1]."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    overlap = width * height
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def box_accuracy(answer: str, gold: Any, meta: Mapping[str, Any]) -> float:
    """Intersection over union of the answer with the gold box; 0 for an answer that is not a box."""
    box, target = parse_box(answer), _box(gold)
    if target is None:
        raise DataError(f"gold answer {gold!r} is not a box")
    return intersection_over_union(box, target) if box else 0.0


def check_box(gold: Any) -> None:
    """Gold is `[left, top, right, bottom]` with left < right and top < bottom."""
    if _box(gold) is None:
        raise DataError(
            f"gold answer {gold!r} is not a box; write [left, top, right, bottom] as four finite numbers, "
            "none negative, with left < right and top < bottom"
        )
