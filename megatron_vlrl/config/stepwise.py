"""The settings that every step reads anew: which they are, and a Config with other values of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args, get_origin

from megatron_vlrl.config.load import is_section, keys, split_key
from megatron_vlrl.config.names import unknown_name
from megatron_vlrl.config.schema import Config
from megatron_vlrl.config.typed import describe

# Besides all numbers under `algorithm`. Any other setting is read when the run is built.
STEPWISE = (
    "rollout.temperature",
    "rollout.max_new_tokens",
    "reward.format_weight",
    "reward.length_weight",
    "optimizer.lr",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
)
_NUMBERS = (float, int, Any)  # Any: an option, which its function checks


def stepwise_keys() -> list[str]:
    """Every key that a schedule may move, in the schema's order; `NAME` stands for an entry of a mapping."""
    return [
        key if annotation in _NUMBERS else f"{key}.NAME"
        for key, annotation in keys().items()
        if _is_stepwise(key) and _item(annotation) in _NUMBERS
    ]


def why_not_stepwise(key: str) -> str | None:
    """Why no schedule can move the setting `key` (dotted; an entry of a mapping is `mapping.NAME`); None: one can."""
    leaf, entry = split_key(key)
    if leaf is None:
        if is_section(key):
            return f"schedules: {key} is a section; a schedule moves one number, under its whole dotted key"
        return str(unknown_name(key, stepwise_keys(), "schedules"))
    annotation = _item(keys()[leaf]) if entry else keys()[leaf]
    if annotation not in _NUMBERS:
        hint = f"; use an entry of it, {leaf}.NAME" if not entry and _item(annotation) in _NUMBERS else ""
        return f"schedules: {key} is {describe(annotation)}; a schedule moves one number{hint}"
    if not _is_stepwise(leaf):
        return f"schedules: {key} is read once, when the run is built; these can change: {', '.join(stepwise_keys())}"
    return None


def with_values(config: Config, values: Mapping[str, float]) -> Config:
    """`config` with each stepwise key of `values` at its value; whole numbers where the setting is one (rounded)."""
    for key, value in values.items():
        leaf, entry = split_key(key)
        assert leaf is not None, key
        annotation = _item(keys()[leaf])
        number = value if annotation is Any else round(value) if annotation is int else float(value)
        config = _with(config, leaf.split("."), entry, number)
    return config


def _with(section: Any, path: list[str], entry: str, value: float) -> Any:
    name, *rest = path
    old = getattr(section, name)
    if rest:
        return replace(section, **{name: _with(old, rest, entry, value)})
    return replace(section, **{name: {**old, entry: value} if entry else value})


def _is_stepwise(leaf: str) -> bool:
    return leaf in STEPWISE or leaf.startswith("algorithm.")


def _item(annotation: Any) -> Any:
    """What an entry of a mapping is; a setting that is none as it is."""
    return get_args(annotation)[1] if get_origin(annotation) is Mapping else annotation
