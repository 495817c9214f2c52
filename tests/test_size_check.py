"""The size check counts what it says, and its exemptions can only shrink."""

from __future__ import annotations

import json

import pytest

from tools.check_sizes import LIMITS, Exemption, Size, main, measure, over, over_all

SOURCE = '''
class Box:
    def put(self, a, b, /, c, *, d, **rest):
        """One line.

        And more.
        """
        def inner():
            return a
        return inner

async def wait(): pass
'''


def sizes(kind):
    return {size.name: size.value for size in measure(SOURCE, "m.py") if size.kind == kind}


def test_functions_count_without_docstring_and_nested_functions():
    assert sizes("function lines") == {"m.py::Box.put": 2, "m.py::Box.put.inner": 2, "m.py::wait": 1}


def test_arguments_count_without_self():
    assert sizes("arguments") == {"m.py::Box.put": 4, "m.py::Box.put.inner": 0, "m.py::wait": 0}


def test_file_lines():
    assert sizes("file lines") == {"m.py": len(SOURCE.splitlines())}


@pytest.mark.parametrize("kind", LIMITS)
def test_limit_is_the_last_size_allowed(kind):
    limit = LIMITS[kind]
    assert over([Size(kind=kind, name="x", value=limit)], {}) == []
    assert over([Size(kind=kind, name="x", value=limit + 1)], {}) == [f"{kind}: x is {limit + 1}, over {limit}"]


def test_exempted_thing_may_not_grow():
    exemptions = {"file lines: x": Exemption(size=700, reason="one table")}
    assert over([Size(kind="file lines", name="x", value=700)], exemptions) == []
    assert over([Size(kind="file lines", name="x", value=701)], exemptions) == ["file lines: x is 701, over 700"]


@pytest.mark.parametrize(
    ("measured", "reason", "expected"),
    [
        ([Size(kind="file lines", name="x", value=600)], "r", "within 600: take its exemption out"),
        ([], "r", "does not exist: take its exemption out"),
        ([Size(kind="file lines", name="x", value=650)], " ", "exempt without a reason"),
    ],
)
def test_useless_exemption_is_a_problem(measured, reason, expected):
    (problem,) = over(measured, {"file lines: x": Exemption(size=700, reason=reason)})
    assert expected in problem


def test_budgets_of_the_whole():
    short = [Size(kind="file lines", name=str(i), value=150) for i in range(9)]
    long = [Size(kind="file lines", name=f"long{i}", value=401) for i in range(2)]
    assert over_all(short + long[:1]) == []
    assert over_all(short + long) == ["18% of the files have more than 400 lines; 10% may"]
    assert "median file has 151" in over_all([Size(kind="file lines", name="x", value=151)])[0]
    functions = [Size(kind="function lines", name="f", value=41)]
    assert over_all(functions) == ["100% of the functions have more than 40 lines; 10% may"]


def test_command_fails_on_a_long_file_and_accepts_a_reasoned_one(tmp_path, capsys):
    folder = tmp_path / "tools"
    folder.mkdir()
    (folder / "long.py").write_text("x = 1\n" * 601)
    command = ["--root", str(tmp_path), "--exemptions", str(tmp_path / "exempt.json")]
    assert main(command) == 1
    assert "file lines: tools/long.py is 601, over 600" in capsys.readouterr().out
    exemption = {"file lines: tools/long.py": {"size": 601, "reason": "a table"}}
    (tmp_path / "exempt.json").write_text(json.dumps(exemption))
    assert main(command) == 0
