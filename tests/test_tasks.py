"""Answers and verifiers: what counts as an answer, what each task credits, and what a gold answer must be."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlrl.errors import ConfigError, DataError
from megatron_vlrl.tasks import TASKS, Task, resolve
from megatron_vlrl.tasks.answer import Answer, parse_answer
from megatron_vlrl.tasks.box import intersection_over_union, parse_box
from megatron_vlrl.tasks.edit_distance import levenshtein
from megatron_vlrl.tasks.length import length_reward, trapezoid

GOLD = {"count": "3", "read": "407", "box": [1, 2, 4, 5], "sum": 12, "pick": "7"}


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("<think>3+4</think><answer>7</answer>", "3+4", "7"),
        (" \n<think>two\nlines</think>\n <answer>1 / 2</answer>\t", "two\nlines", "1 / 2"),
        ("<think>x < y</think><answer>x < y</answer>", "x < y", "x < y"),
        ("<think></think><answer> 3 </answer>", "", " 3 "),
    ],
)
def test_an_answer_is_read_as_it_was_written(text: str, thinking: str, answer: str) -> None:
    assert parse_answer(text) == Answer(thinking=thinking, text=answer)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "<answer>7</answer>",
        "<think>3+4</think>7",
        "<think>3+4</think><answer>7",
        "<think>3+4<answer>7</answer></think>",
        "<think><answer>7</answer></think>",
        "<answer>7</answer><think>3+4</think>",
        "<think>3+4</think><answer>7</answer><answer>8</answer>",
        "<think>3</think><think>4</think><answer>7</answer>",
        "<think>3+4</think><answer>7</answer> so 7",
        "so <think>3+4</think><answer>7</answer>",
        "<think>3+4</think> then <answer>7</answer>",
        "<THINK>3+4</THINK><ANSWER>7</ANSWER>",
        "<think>3+4</think><answer>7<answer></answer>",
    ],
)
def test_anything_else_has_no_answer(text: str) -> None:
    assert parse_answer(text) is None


@pytest.mark.parametrize(
    ("task", "answer", "accuracy"),
    [
        ("count", "3", 1.0),
        ("count", " 3\n", 1.0),
        ("count", "3.00", 1.0),
        ("count", "3 2 1", 0.0),
        ("count", "1,2,3", 0.0),
        ("count", "33", 0.0),
        ("count", "\uff13", 0.0),  # a full-width 3
        ("count", "\u0663", 0.0),  # an Arabic-Indic 3
        ("count", "1+2", 0.0),
        ("count", "NaN", 0.0),
        ("count", "three", 0.0),
        ("count", "9" * 10_000, 0.0),
        ("sum", "12", 1.0),
        ("sum", "+12", 1.0),
        ("sum", "-12", 0.0),
        ("read", "407", 1.0),
        ("read", "40", 1 - 1 / 3),
        ("read", "4077", 1 - 1 / 4),
        ("read", "047", 1 - 2 / 3),
        ("read", "", 0.0),
        ("pick", "7", 1.0),
        ("pick", "3 7 1", 0.0),
        ("pick", "7.0", 0.0),
        ("box", "[1,2,4,5]", 1.0),
        ("box", " [1.0, 2, 4.0, 5]\n", 1.0),
        ("box", "[2,2,5,5]", 6 / 12),
        ("box", "[4,5,8,8]", 0.0),
        ("box", "[4,5,1,2]", 0.0),
        ("box", "[1,2,4,5,1,2,4,5]", 0.0),
        ("box", "[1,2,4]", 0.0),
        ("box", '["1","2","4","5"]', 0.0),
        ("box", "[true,2,4,5]", 0.0),
        ("box", "[-1,2,4,5]", 0.0),
        ("box", "[NaN,2,4,5]", 0.0),
        ("box", "[1,2,Infinity,5]", 0.0),
        ("box", "[0,0,1e999,1e999]", 0.0),
        ("box", "[0,0,1e300,1e300]", 0.0),
        ("box", f"[0,0,{'9' * 5000},5]", 0.0),
        ("box", "[" * 100_000, 0.0),
        ("box", '{"box":[1,2,4,5],"box":[1,2,4,5]}', 0.0),
        ("box", "[[1,2,4,5]]", 0.0),
        ("box", "[1,2,4,5] [1,2,4,5]", 0.0),
        ("box", "1,2,4,5", 0.0),
        ("box", "", 0.0),
    ],
)
def test_accuracy(task: str, answer: str, accuracy: float) -> None:
    assert resolve(task).accuracy(answer, GOLD[task], {}) == pytest.approx(accuracy, abs=1e-12)


@given(st.text(max_size=30))
def test_any_text_is_judged_within_bounds(text: str) -> None:
    for name, gold in GOLD.items():
        assert 0.0 <= TASKS[name].accuracy(text, gold, {}) <= 1.0


@pytest.mark.parametrize("task", sorted(TASKS))
def test_good_gold_passes_and_its_own_text_is_right(task: str) -> None:
    resolve(task).check_gold(GOLD[task])
    assert resolve(task).accuracy(str(GOLD[task]), GOLD[task], {}) == 1.0


@pytest.mark.parametrize(
    ("task", "gold"),
    [
        ("count", "many"),
        ("count", None),
        ("count", True),
        ("count", ["3"]),
        ("count", math.nan),
        ("sum", ""),
        ("read", " "),
        ("read", 407),
        ("pick", None),
        ("box", [4, 2, 1, 5]),
        ("box", [1, 2, 4]),
        ("box", [1, 2, math.inf, 5]),
        ("box", [math.nan, 2, 4, 5]),
        ("box", "[1,2,4,5]"),
        ("box", None),
    ],
)
def test_gold_that_could_not_be_judged_against_is_refused(task: str, gold: object) -> None:
    with pytest.raises(DataError, match=r"gold answer .*; write"):
        resolve(task).check_gold(gold)


def _slow_distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(
        _slow_distance(a[1:], b) + 1, _slow_distance(a, b[1:]) + 1, _slow_distance(a[1:], b[1:]) + (a[0] != b[0])
    )


@given(st.text("ab1", max_size=5), st.text("ab1", max_size=5))
def test_levenshtein_is_the_least_number_of_edits(a: str, b: str) -> None:
    assert levenshtein(a, b) == _slow_distance(a, b)


def test_overlap_counts_cells() -> None:
    a, b = (0, 0, 3, 4), (2, 1, 6, 3)
    cells = [{(x, y) for x in range(c[0], c[2]) for y in range(c[1], c[3])} for c in (a, b)]
    assert intersection_over_union(a, b) == pytest.approx(len(cells[0] & cells[1]) / len(cells[0] | cells[1]))
    assert parse_box("[0, 0, 3, 4]") == (0.0, 0.0, 3.0, 4.0)


def test_an_integer_of_400_digits_is_no_number_for_a_box() -> None:
    assert resolve("box").accuracy(f"[0, 0, {'9' * 400}, 5]", [1.5, 2.5, 4.5, 5.5], {}) == 0.0


def half(answer: str, gold: object, meta: object) -> float:
    """A user's verifier."""
    return 0.5


USER_TASK = Task(name="user", accuracy=half, check_gold=lambda gold: None)
NOT_A_TASK = 3


def test_a_users_task_or_function_stands_where_a_name_does() -> None:
    assert resolve("tests.test_tasks:USER_TASK") is USER_TASK
    task = resolve("tests.test_tasks:half")
    assert task.name == "tests.test_tasks:half"
    assert task.accuracy("x", "y", {}) == 0.5
    task.check_gold("anything")
    with pytest.raises(DataError, match="null"):
        task.check_gold(None)


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'count'"):
        resolve("counts")
    with pytest.raises(ConfigError, match="is a int; it must be a Task"):
        resolve("tests.test_tasks:NOT_A_TASK")


@pytest.mark.parametrize(
    ("length", "expected"),
    [(9, 0), (10, 0), (15, 0.5), (20, 1), (25, 1), (30, 1), (35, 0.5), (40, 0), (41, 0)],
)
def test_trapezoid(length: int, expected: float) -> None:
    assert trapezoid(length, (10, 20, 30, 40)) == expected


def test_equal_thresholds_make_a_step() -> None:
    assert [trapezoid(n, (10, 10, 30, 30)) for n in (9, 10, 30, 31)] == [0, 1, 1, 0]
    assert [trapezoid(n, (7, 7, 7, 7)) for n in (6, 7, 8)] == [0, 1, 0]
    assert [trapezoid(n, (0, 0, 5, math.inf)) for n in (0, 5, 10_000)] == [1, 1, 1]


@pytest.mark.parametrize("band", [(20, 10, 30, 40), (10, 20, 15, 40), (10, 20, 30, 25), (10, math.nan, 30, 40)])
def test_a_band_out_of_order_is_refused(band: tuple[float, float, float, float]) -> None:
    with pytest.raises(ConfigError, match="out of order"):
        trapezoid(15, band)


def test_length_can_be_kept_for_right_answers() -> None:
    band = (10.0, 20.0, 30.0, 40.0)
    assert length_reward(25, band, accuracy=0.0, only_if_correct=False) == 1.0
    assert length_reward(25, band, accuracy=0.0, only_if_correct=True) == 0.0
    assert length_reward(35, band, accuracy=0.5, only_if_correct=True) == 0.5


def test_import_is_light() -> None:
    code = "import sys, megatron_vlrl.tasks.reward; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
