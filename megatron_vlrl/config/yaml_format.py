"""YAML text in, plain values out, and back: one safe dialect for configuration files, overrides and saved copies.

PyYAML follows YAML 1.1, where `no` is false, `1e-4` is a string and `2026-01-01` is a date. Here only the forms of
YAML 1.2 count: true/false, decimal integers and floats, null. A key given twice is an error, not the last one.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

_RESOLVERS = (
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|)$"), ["~", "n", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf")),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$"),
        list("-+.0123456789"),
    ),
)


_KeyMistake = yaml.constructor.ConstructorError


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own name; filled below)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _KeyMistake(None, None, f"{key!r} cannot be a key", key_node.start_mark)
            if key in seen:
                raise _KeyMistake(None, None, f"the key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    # Keeps PyYAML's own rules beside ours, so that other readers, too, find a string where a string was written.
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _decimal(loader: Any, node: Any) -> int:
    return int(loader.construct_scalar(node))


for _tag, _pattern, _first in _RESOLVERS:
    # Also when writing: a string which looks like one of these forms is then quoted.
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


def read_yaml(text: str) -> Any:
    """The value that `text` stands for. Raises yaml.YAMLError, whose text has line and column."""
    return yaml.load(text, Loader=_Loader)


def write_yaml(value: Any) -> str:
    """Block-style YAML of plain values, in the order given; `read_yaml` gives back an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)
