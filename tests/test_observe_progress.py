"""The step line: aligned for any values; the bar only in a terminal."""

from __future__ import annotations

import io
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlrl.observe.progress import Progress, StepLines, fit
from megatron_vlrl.types import Mean, StepStats
from tests.fake_run import TASKS, stats


@given(st.one_of(st.none(), st.floats(), st.integers(-(10**12), 10**12)), st.integers(5, 9))
def test_fit_never_exceeds_its_width(value: float | None, width: int) -> None:
    assert 1 <= len(fit(value, width)) <= width


@given(st.floats(min_value=1e-90, max_value=1e90), st.sampled_from([1, -1]))
def test_fit_is_close_where_it_shows_a_number(size: float, sign: int) -> None:
    assert math.isclose(float(fit(sign * size, 7)), sign * size, rel_tol=0.5)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.7125, "0.713"),
        (3.21e-6, "3.2e-6"),
        (0.0, "0.000"),
        (12345.678, "12345.7"),
        (float("nan"), "nan"),
        (None, "-"),
    ],
)
def test_fit_examples(value: float | None, text: str) -> None:
    assert fit(value, 7) == text


def _bars(line: str) -> list[int]:
    return [at for at, letter in enumerate(line) if letter == "|"]


def test_lines_align_for_any_values() -> None:
    lines = StepLines(120, (*TASKS, "my_package.rewards:a_task_with_a_long_name"))
    wild = StepStats(
        step=3,
        means={"reward/count": Mean(total=-1e300, count=1), "accuracy/count": Mean(total=0, count=0)},
        scalars={"grad_norm": float("inf"), "mismatch_kl": -1e-200},
        seconds={"rollout": 123456.789, "a new stage": 1e-12},
    )
    texts = [lines.header(), lines.line(stats(1)), lines.line(stats(119)), lines.line(wild)]
    assert len({len(text) for text in texts}) == 1
    assert len({tuple(_bars(text)) for text in texts}) == 1
    assert _bars(texts[0])


def test_line_shows_the_values_and_the_reason_of_a_skip() -> None:
    lines = StepLines(50, ("count",), stages=("rollout",))
    means = {
        "reward/count": Mean(total=3, count=4),
        "accuracy/count": Mean(total=1, count=2),
        "response_length": Mean(total=25, count=2),
    }
    step = StepStats(
        step=7,
        means=means,
        scalars={"grad_norm": 2.5},
        seconds={"rollout": 1.5, "score": 0.25, "sync": 0.5},
        skipped="no\nusable group",
    )
    parts = lines.line(step).split("|")
    assert parts[0].strip() == "7/50"
    assert parts[1].strip() == "0.750/0.500"
    assert parts[2].split() == ["12.500", "-", "-", "2.500"]
    assert parts[3].split() == ["1.500", "0.750", "skipped:", "no", "usable", "group"]
    assert "\n" not in lines.line(step)


def test_header_comes_back_and_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    progress = Progress(41, TASKS, stream=stream)
    for step in range(41):
        progress.show(stats(step))
    progress.close()
    lines = stream.getvalue().splitlines()
    header = StepLines(41, TASKS).header()
    assert [number for number, line in enumerate(lines) if line == header] == [1, 22, 43]
    assert len(lines) == 41 + 3 + 1
    assert capsys.readouterr().err == ""


def test_bar_with_the_time_left_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen, stream = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    progress = Progress(10, TASKS, start=4, stream=stream)
    progress.show(stats(4))
    progress.close()
    assert "5/10" in screen.getvalue()
    assert "count" in stream.getvalue()
    assert "5/10 [" not in stream.getvalue()
