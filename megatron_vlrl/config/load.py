"""A YAML file and `key=value` overrides in, one frozen Config out; and a Config back to YAML.

The keys are closed: what the schema does not name is an error that says the nearest key there is.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import yaml

from megatron_vlrl.config.schema import Config
from megatron_vlrl.config.typed import WrongTypeError, describe, takes_text, typed
from megatron_vlrl.config.yaml_format import read_yaml, write_yaml
from megatron_vlrl.errors import ConfigError

COMMAND_LINE = "the command line"


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of `path` (or the defaults) with each `section.key=value` of `overrides` laid over it in turn.

    A value is YAML. Under a mapping one entry can be set: `data.weights.count=2`. Types follow the schema's
    annotations; nothing is checked beyond them (see `checks`). Raises ConfigError for an unreadable file, an unknown
    key or a wrong type, naming the key and where it was given.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values.update(_leaves(_read(path), (), str(path)))
    for override in overrides:
        _lay_over(values, override)
    config: Config = _build(Config, (), values)
    return config


def dump(config: Config) -> str:
    """YAML of every setting; `load` of it gives an equal Config."""
    return write_yaml(_plain(dataclasses.asdict(config)))


@cache
def keys() -> Mapping[str, Any]:
    """Every dotted key with its type annotation, in the schema's order."""
    return dict(_schema(Config, ()))


def _schema(section: type, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, annotation in get_type_hints(section).items():
        if dataclasses.is_dataclass(annotation):
            yield from _schema(annotation, (*path, name))  # type: ignore[arg-type]
        else:
            yield ".".join((*path, name)), annotation


def is_section(key: str) -> bool:
    """Whether settings lie under the dotted `key`."""
    return any(known.startswith(key + ".") for known in keys())


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    try:
        return read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def _leaves(tree: Any, path: tuple[str, ...], source: str) -> Iterator[tuple[str, Any]]:
    """The settings of a nested tree as (dotted key, typed value)."""
    if tree is None:  # a section whose lines are all comments
        return
    if not isinstance(tree, Mapping):
        where = ".".join(path) or "the whole file"
        raise ConfigError(f"{source}: {where} is a section, so a mapping of keys was expected, got {tree!r}")
    for name, value in tree.items():
        key = ".".join((*path, str(name)))
        if "." in str(name):
            raise _unknown(key, source)
        if key in keys():
            yield key, _typed(key, value, source)
        elif is_section(key):
            yield from _leaves(value, (*path, str(name)), source)
        else:
            raise _unknown(key, source)


def _lay_over(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"{COMMAND_LINE}: {override!r} is not of the form section.key=value")
    leaf, entry = split_key(key)
    if leaf is not None and not entry and takes_text(keys()[leaf]):
        values[leaf] = _typed(leaf, text, COMMAND_LINE)
        return
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{COMMAND_LINE}: the value of {key} is not valid YAML: {error}") from error
    if leaf is None:
        if not is_section(key):
            raise _unknown(key, COMMAND_LINE)
        values.update(_leaves(value, tuple(key.split(".")), COMMAND_LINE))
    elif entry:
        values[leaf] = {**values.get(leaf, {}), **_typed(leaf, {entry: value}, COMMAND_LINE)}
    else:
        values[leaf] = _typed(leaf, value, COMMAND_LINE)


def split_key(key: str) -> tuple[str | None, str]:
    """The setting that a dotted key names, and the entry within it where that setting is a mapping; None for none."""
    if key in keys():
        return key, ""
    for leaf, annotation in keys().items():
        if key.startswith(leaf + ".") and get_origin(annotation) is Mapping:
            return leaf, key.removeprefix(leaf + ".")
    return None, ""


def _typed(key: str, value: Any, source: str) -> Any:
    try:
        return typed(keys()[key], value)
    except WrongTypeError as error:
        raise ConfigError(f"{source}: {key}: {error}") from error


def _unknown(key: str, source: str) -> ConfigError:
    if split_key(key)[0]:
        section, _, last = key.rpartition(".")
        return ConfigError(f"{source}: write {key} nested: {section.replace('.', ': ')}: {{{last}: ...}}")
    near = difflib.get_close_matches(key, keys(), n=1, cutoff=0.75)
    last = key.rpartition(".")[2]
    near += [known for known in keys() if known.rpartition(".")[2] == last]
    near += difflib.get_close_matches(key, keys(), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]} ({describe(keys()[near[0]])})?" if near else ""
    return ConfigError(f"{source}: unknown key {key}{hint}")


def _build(section: type, path: tuple[str, ...], values: Mapping[str, Any]) -> Any:
    arguments = {}
    for name, annotation in get_type_hints(section).items():
        key = ".".join((*path, name))
        if dataclasses.is_dataclass(annotation):
            arguments[name] = _build(annotation, (*path, name), values)  # type: ignore[arg-type]
        elif key in values:
            arguments[name] = values[key]
    return section(**arguments)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
