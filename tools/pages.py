"""Parts of a page that a tool writes: text between `<!-- begin NAME -->` and `<!-- end NAME -->`, the rest by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path


def replace_parts(page: str, parts: Mapping[str, str]) -> str:
    """The page with each named part's text replaced. Raises ValueError unless the page has exactly these parts."""
    found = re.findall(r"^<!-- begin (\S+) -->$", page, re.MULTILINE)
    if sorted(found) != sorted(parts):
        raise ValueError(f"the page has the parts {sorted(found)}, the tool writes {sorted(parts)}; make them equal")
    for name, text in parts.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        head, _, rest = page.partition(begin)
        _, closed, tail = rest.partition(end)
        if not closed:
            raise ValueError(f"the part {name} has no line {end!r}")
        page = f"{head}{begin}{text.rstrip()}\n{end}{tail}"
    return page


def write_parts(path: Path, parts: Mapping[str, str]) -> None:
    """Replace the parts of the page at `path`."""
    path.write_text(replace_parts(path.read_text(encoding="utf-8"), parts), encoding="utf-8")


def code_block(text: str) -> str:
    """Text as a Markdown block of plain text."""
    return f"```text\n{text.rstrip()}\n```"
