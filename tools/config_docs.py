"""The schema in; docs/configuration.md's tables of every key out: type, default, and the comment beside it.

python tools/config_docs.py         print them
python tools/config_docs.py --write
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlrl.algorithms import ADVANTAGES
from megatron_vlrl.algorithms.schedules import SCHEDULES
from megatron_vlrl.config import schema
from megatron_vlrl.config.checks import value_of
from megatron_vlrl.config.stepwise import stepwise_keys
from megatron_vlrl.config.typed import describe
from tools.pages import write_parts

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"


def comments(source: str) -> dict[tuple[str, str], str]:
    """(class, field) -> the comment behind the field, or the whole line of comment above it."""
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                behind = lines[field.lineno - 1][field.end_col_offset or 0 :].strip()
                above = lines[field.lineno - 2].strip()
                comment = behind if behind.startswith("#") else above if above.startswith("#") else ""
                found[node.name, field.target.id] = comment.removeprefix("#").strip()
    return found


def sections(section: type, path: tuple[str, ...] = ()) -> Iterator[tuple[str, type, dict[str, Any]]]:
    """(dotted name, class, its own keys with their annotations) for every section that has keys; the top level last."""
    hints = get_type_hints(section)
    own = {name: hint for name, hint in hints.items() if not dataclasses.is_dataclass(hint)}
    if own and path:
        yield ".".join(path), section, own
    for name, hint in hints.items():
        if name not in own:
            yield from sections(hint, (*path, name))
    if own and not path:
        yield "top level", section, own


def keys_part() -> str:
    """A heading and a table for each section."""
    notes = comments(inspect.getsource(schema))
    parts = []
    for name, section, own in sections(schema.Config):
        prefix = "" if section is schema.Config else f"{name}."
        rows = [
            f"| `{prefix}{key}` | {_cell(describe(hint))} | `{_default(f'{prefix}{key}')}` "
            f"| {_cell(notes[section.__name__, key])} |"
            for key, hint in own.items()
        ]
        text = " ".join((section.__doc__ or "").split())
        parts.append("\n".join([f"### {name}", "", text, "", "| key | type | default | |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts)


def options_part() -> str:
    """The options of every kind of advantage, with their defaults; `state` is the run's."""
    rows = []
    for kind, method in ADVANTAGES.items():
        known = inspect.signature(method).parameters.values()
        options = [
            f"`{p.name}: {json.dumps(p.default)}`" for p in known if p.kind is p.KEYWORD_ONLY and p.name != "state"
        ]
        rows.append(f"| `{kind}` | {', '.join(options) or 'none'} |")
    return "\n".join(["| kind | options and their defaults |", "|---|---|", *rows])


def schedules_part() -> str:
    """What can be scheduled, and the arguments of every kind of schedule."""
    rows = []
    for kind, schedule in SCHEDULES.items():
        known = [p for p in inspect.signature(schedule).parameters.values() if p.kind is p.KEYWORD_ONLY]
        arguments = [f"`{p.name}`" if p.default is p.empty else f"`{p.name}: {json.dumps(p.default)}`" for p in known]
        text = " ".join((schedule.__doc__ or "").split("\n\n")[0].split())
        rows.append(f"| `{kind}` | {', '.join(arguments)} | {_cell(text)} |")
    keys = ", ".join(f"`{key}`" for key in stepwise_keys())
    table = ["| kind | arguments and their defaults | |", "|---|---|---|", *rows]
    return "\n".join([f"Settings that can have one: {keys}.", "", *table])


def parts() -> Mapping[str, str]:
    """All that is generated, by the part's name."""
    return {"keys": keys_part(), "options": options_part(), "schedules": schedules_part()}


def _default(key: str) -> str:
    return json.dumps(value_of(schema.Config(), key))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Print, or write into the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help="into docs/configuration.md")
    if parser.parse_args().write:
        write_parts(PAGE, parts())
    else:
        print("\n\n".join(parts().values()))


if __name__ == "__main__":
    main()
