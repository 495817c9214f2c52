"""The tour runs, and its page says what a fresh run says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.pages import replace_parts

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"(?<![\w.])[+-]?\d+\.\d+(?!\w)")


def blocks(page: str) -> dict[str, list[str]]:
    """The text blocks of the page by their part's name, as lines."""
    found = re.findall(r"<!-- begin (\w+) -->\n```text\n(.*?)```\n<!-- end \1 -->", page, re.DOTALL)
    return {name: text.splitlines() for name, text in found}


@pytest.fixture(scope="module")
def printed() -> dict[str, list[str]]:
    command = [sys.executable, "tools/trace_sample.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    stages = re.split(r"^== (\w+)\n", result.stdout, flags=re.MULTILINE)
    return {name: text.strip().splitlines() for name, text in zip(stages[1::2], stages[2::2], strict=True)}


def test_page_shows_every_stage_in_order(printed):
    assert list(blocks((ROOT / "docs/tour.md").read_text())) == list(printed)


def test_page_is_what_a_run_prints(printed):
    """Text and whole numbers alike; a number with decimals may be off by one in its last place, as another
    processor adds in another order."""
    for name, lines in blocks((ROOT / "docs/tour.md").read_text()).items():
        assert len(lines) == len(printed[name]), name
        for ours, theirs in zip(lines, printed[name], strict=True):
            assert NUMBER.sub("~", ours) == NUMBER.sub("~", theirs), f"{name}: run tools/trace_sample.py --write"
            for a, b in zip(NUMBER.findall(ours), NUMBER.findall(theirs), strict=True):
                last_place = 10.0 ** -len(a.partition(".")[2])
                assert float(a) == pytest.approx(float(b), abs=1.01 * last_place), f"{name}: {ours} | {theirs}"


def test_the_update_favours_the_right_answer(printed):
    right, wrong = (float(NUMBER.findall(line)[0]) for line in printed["weights"][-2:])
    assert right > 0 > wrong
    assert "agree" in printed["engine"][-1]


def test_parts_of_a_page_are_replaced_and_nothing_else():
    page = "top\n<!-- begin a -->\nold\n<!-- end a -->\nbottom\n<!-- begin b -->\n<!-- end b -->\n"
    new = replace_parts(page, {"b": "B", "a": "A\n"})
    assert new == "top\n<!-- begin a -->\nA\n<!-- end a -->\nbottom\n<!-- begin b -->\nB\n<!-- end b -->\n"
    assert replace_parts(new, {"a": "A", "b": "B"}) == new


@pytest.mark.parametrize(
    ("page", "parts", "message"),
    [
        ("<!-- begin a -->\n<!-- end a -->\n", {"a": "", "b": ""}, "has the parts"),
        ("<!-- begin a -->\n<!-- end a -->\n", {}, "has the parts"),
        ("<!-- begin a -->\n", {"a": ""}, "no line '<!-- end a -->'"),
    ],
)
def test_a_page_that_does_not_fit_is_refused(page, parts, message):
    with pytest.raises(ValueError, match=message):
        replace_parts(page, parts)
