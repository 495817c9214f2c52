"""Names in, what they stand for out: an entry of a visible table, or a user's `package.module:object`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from megatron_vlrl.errors import ConfigError

Entry = TypeVar("Entry")


def unknown_name(name: str, known: Iterable[str], key: str) -> ConfigError:
    """The error for a `name` under the setting `key` that is not among `known`: lists them, nearest match first."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ConfigError(f"{key}: unknown {name!r}; {hint}known: {', '.join(choices) or 'none'}")


def resolve_name(name: str, table: Mapping[str, Entry], key: str) -> Entry:
    """The entry `name` of `table`, or the object that a user's `package.module:object` names.

    key: the setting that holds the name, for the message. What kind of object a user's name gives is for the
    caller to check. Raises ConfigError for an unknown name, a module that cannot be found, or an object that the
    module has not; an error inside the user's module is his to see.
    """
    if name in table:
        return table[name]
    module_name, _, attribute = name.partition(":")
    if not (attribute and all(part.isidentifier() for part in module_name.split("."))):
        raise unknown_name(name, [*table, "package.module:object"], key)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module was found; something that it imports was not
        raise ConfigError(f"{key}: no module {module_name!r} for {name!r}; is its folder on PYTHONPATH?") from error
    if not hasattr(module, attribute):
        choices = [item for item in vars(module) if not item.startswith("_")]
        raise unknown_name(attribute, choices, f"{key}: in module {module_name}")
    found: Entry = getattr(module, attribute)
    return found
