"""Python files under the given folders -> what is larger than it reads well; exit 1 if anything is over.

A file's length is its lines. A function's length is its lines without its docstring and without functions nested in
it, which count by themselves. Arguments leave out self and cls. What must be larger stands in
tools/size_exemptions.json (`{"file lines: PATH": {"size": 640, "reason": "..."}}`) with its present size; the list may
only shrink: an exempted thing may not grow, and one that fits again must be taken out.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("megatron_vlrl", "tools", "examples", "tests")
EXEMPTIONS = ROOT / "tools" / "size_exemptions.json"

Kind = Literal["file lines", "function lines", "arguments"]
LIMITS: Mapping[Kind, int] = {"file lines": 600, "function lines": 80, "arguments": 8}
# Over the whole of the package: the median file, and the share of files and of functions that may be over an aim.
MEDIAN_FILE, LONG_FILE, LONG_FUNCTION, SHARE = 150, 400, 40, 0.10


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """One measured thing. name: `path` of a file, or `path::qualified.name` of a function."""

    kind: Kind
    name: str
    value: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Exemption:
    """Leave to be larger than the limit, up to `size`."""

    size: int
    reason: str


def measure(source: str, path: str) -> Iterator[Size]:
    """Every size in one file's source."""
    yield Size(kind="file lines", name=path, value=len(source.splitlines()))
    yield from _functions(ast.parse(source), f"{path}::")


def _functions(node: ast.AST, prefix: str) -> Iterator[Size]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}{child.name}"
            yield Size(kind="function lines", name=name, value=_own_lines(child))
            yield Size(kind="arguments", name=name, value=_arguments(child.args))
            yield from _functions(child, f"{name}.")
        else:
            yield from _functions(child, prefix)


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _own_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    nested = [
        n for n in ast.walk(function) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n is not function
    ]
    outermost = [
        n for n in nested if not any(n is not m and m.lineno <= n.lineno <= (m.end_lineno or 0) for m in nested)
    ]
    docstring = _lines(function.body[0]) if ast.get_docstring(function, clean=False) is not None else 0
    return _lines(function) - docstring - sum(_lines(n) for n in outermost)


def _arguments(arguments: ast.arguments) -> int:
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in named)


def over(sizes: Iterable[Size], exemptions: Mapping[str, Exemption]) -> list[str]:
    """One line for each thing over its limit or its exemption, and for each exemption that is not needed any more."""
    problems = []
    unused = dict(exemptions)
    for size in sizes:
        key = f"{size.kind}: {size.name}"
        limit = LIMITS[size.kind]
        exemption = unused.pop(key, None)
        if exemption is not None and size.value <= limit:
            problems.append(f"{key} is {size.value}, within {limit}: take its exemption out")
        elif exemption is not None:
            limit = exemption.size
        if size.value > limit:
            problems.append(f"{key} is {size.value}, over {limit}")
    problems += [f"{key} does not exist: take its exemption out" for key in unused]
    problems += [f"{key} is exempt without a reason" for key, value in exemptions.items() if not value.reason.strip()]
    return problems


def over_all(sizes: Sequence[Size]) -> list[str]:
    """One line for each budget of the package as a whole that is exceeded."""
    files = [size.value for size in sizes if size.kind == "file lines"]
    functions = [size.value for size in sizes if size.kind == "function lines"]
    problems = []
    if files and statistics.median(files) > MEDIAN_FILE:
        problems.append(f"the median file has {statistics.median(files):.0f} lines, over {MEDIAN_FILE}")
    for what, values, aim in (("files", files, LONG_FILE), ("functions", functions, LONG_FUNCTION)):
        share = sum(value > aim for value in values) / max(len(values), 1)
        if share > SHARE:
            problems.append(f"{share:.0%} of the {what} have more than {aim} lines; {SHARE:.0%} may")
    return problems


def summary(sizes: Sequence[Size]) -> str:
    """One line on how large files and functions are."""
    files = sorted(size.value for size in sizes if size.kind == "file lines")
    functions = sorted(size.value for size in sizes if size.kind == "function lines")
    if not files or not functions:
        return f"{len(files)} files, {len(functions)} functions"
    return (
        f"{len(files)} files, {sum(files)} lines: median {statistics.median(files):.0f}, longest {files[-1]}; "
        f"{len(functions)} functions: median {statistics.median(functions):.0f}, longest {functions[-1]}"
    )


def _exemptions(path: Path) -> dict[str, Exemption]:
    if not path.exists():
        return {}
    return {key: Exemption(**value) for key, value in json.loads(path.read_text(encoding="utf-8")).items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Print what is over; 0 if nothing is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--exemptions", type=Path, default=EXEMPTIONS)
    arguments = parser.parse_args(argv)
    sizes: list[Size] = []
    for folder in FOLDERS:
        for path in sorted((arguments.root / folder).rglob("*.py")):
            sizes += measure(path.read_text(encoding="utf-8"), path.relative_to(arguments.root).as_posix())
    package = [size for size in sizes if size.name.startswith("megatron_vlrl/")]
    problems = over(sizes, _exemptions(arguments.exemptions)) + over_all(package)
    for problem in problems:
        print(problem)
    print(f"megatron_vlrl: {summary(package)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
