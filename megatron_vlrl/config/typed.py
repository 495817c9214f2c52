"""A plain value and a type annotation in, a value of that type out, or one sentence of what is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin


class WrongTypeError(ValueError):
    """What was expected and what was given; the caller knows the key and where it stands."""


def describe(annotation: Any) -> str:
    """An annotation as a reader would say it."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return "anything"
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in args)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return f"a list of {describe(args[0])}"
        return f"a list of {len(args)}: " + ", ".join(describe(item) for item in args)
    if origin is Mapping:
        return f"a mapping from {describe(args[0])} to {describe(args[1])}"
    return str(annotation.__name__)


def takes_text(annotation: Any) -> bool:
    """Whether a setting of this type is plain text, so that a word on the command line needs no YAML."""
    return annotation is str or (
        get_origin(annotation) is Literal and all(isinstance(item, str) for item in get_args(annotation))
    )


def typed(annotation: Any, value: Any) -> Any:
    """`value` as `annotation` says: int taken for float, list for tuple; everything else must already fit.

    Knows int, float, bool, str, Any, Literal, tuple and Mapping, nested. Raises WrongTypeError.
    """
    if annotation is Any:
        return value
    convert = _CONVERTERS.get(get_origin(annotation) or annotation)
    if convert is None:
        raise TypeError(f"no rule reads settings of type {annotation}")
    return convert(annotation, value)


def _wrong(annotation: Any, value: Any) -> WrongTypeError:
    return WrongTypeError(f"expected {describe(annotation)}, got {value!r} ({type(value).__name__})")


def _exact(annotation: Any, value: Any) -> Any:
    # type() and not isinstance(): True is an int to Python, never to a reader.
    if type(value) is not annotation:
        raise _wrong(annotation, value)
    return value


def _float(annotation: Any, value: Any) -> float:
    if type(value) not in (int, float):
        raise _wrong(annotation, value)
    if not math.isfinite(value):
        raise WrongTypeError(f"expected a finite number, got {value!r}")
    return float(value)


def _literal(annotation: Any, value: Any) -> Any:
    if not any(type(value) is type(choice) and value == choice for choice in get_args(annotation)):
        raise _wrong(annotation, value)
    return value


def _tuple(annotation: Any, value: Any) -> tuple[Any, ...]:
    items = get_args(annotation)
    if not isinstance(value, list | tuple):
        raise _wrong(annotation, value)
    if items[-1] is Ellipsis:
        return tuple(typed(items[0], item) for item in value)
    if len(value) != len(items):
        raise _wrong(annotation, value)
    return tuple(typed(item, entry) for item, entry in zip(items, value, strict=True))


def _mapping(annotation: Any, value: Any) -> Mapping[Any, Any]:
    if value is None:  # `weights:` with nothing under it
        return {}
    if not isinstance(value, Mapping):
        raise _wrong(annotation, value)
    key_type, item_type = get_args(annotation)
    out = {}
    for key, item in value.items():
        try:
            out[typed(key_type, key)] = typed(item_type, item)
        except WrongTypeError as error:
            raise WrongTypeError(f"at {key!r}: {error}") from None
    return out


_CONVERTERS: Mapping[Any, Any] = {
    int: _exact,
    bool: _exact,
    str: _exact,
    float: _float,
    Literal: _literal,
    tuple: _tuple,
    Mapping: _mapping,
}
