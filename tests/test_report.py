"""The report and the table that ends a run: complete, self-contained, harmless, honest about what is missing."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlrl.observe.metrics import MetricsWriter, read_metrics
from megatron_vlrl.observe.page import escape, inline_image
from megatron_vlrl.observe.records import EvaluationLog
from megatron_vlrl.observe.report import write_report
from megatron_vlrl.observe.summary import summarize, summary_table
from megatron_vlrl.observe.svg import Series, line_chart, smooth, thin, ticks
from megatron_vlrl.types import Mean, StepStats
from tests.fake_run import TASKS, png, stats, write_run

VOID = {"meta", "img", "br", "line", "circle", "polyline"}


class _Page(HTMLParser):
    """Checks that tags nest, and collects them with their attributes and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> _Page:
    folder = tmp_path_factory.mktemp("runs") / "fake"
    write_run(folder)
    path = write_report(folder)
    assert path == folder / "report.html"
    assert path.stat().st_size < 2_000_000
    return _Page(path.read_text(encoding="utf-8"))


def test_hostile_text_stays_text(page: _Page) -> None:
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "link", "form", "base"}
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert '<script>alert("x")</script>' in "".join(page.text)


def test_nothing_is_fetched(page: _Page) -> None:
    for tag, attributes in page.tags:
        for key in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(key) or "#").startswith(("data:image/", "#")), (tag, attributes)
    policies = [attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv")]
    assert policies == ["default-src 'none';img-src data:;style-src 'unsafe-inline'"]


def test_everything_is_on_the_page(page: _Page) -> None:
    text = "".join(page.text)
    charts = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    for name in (*TASKS, "Response length", "Entropy", "KL of sampler", "Gradient norm", "Seconds by stage", "lr"):
        assert any((chart or "").startswith(name) for chart in charts), name
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 12 * 3
    for piece in ("0.600 ± 0.038", "0.750 ± 0.038", "+0.150", "640", "+1.20", "-0.31", "gold answer", "<b>fake</b>"):
        assert piece in text, piece
    assert "step 4 skipped: every group is uniform" in text
    assert "Step 110" in text


def test_empty_folder_still_gives_a_page(tmp_path: Path) -> None:
    text = "".join(_Page(write_report(tmp_path).read_text(encoding="utf-8")).text)
    for piece in ("no step was recorded", "no greedy evaluation", "No rollouts were kept", "no config.yaml"):
        assert piece in text


def test_images_large_missing_or_foreign(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png(side=400) + b"\0" * 300_000)
    (tmp_path / "foreign.bin").write_bytes(b"<svg onload=alert(1)>")
    (tmp_path / "broken.bin").write_bytes(b"\0" * 300_000)
    assert inline_image(tmp_path / "large.png").startswith('<img alt="large.png" src="data:image/jpeg;base64,')
    assert len(inline_image(tmp_path / "large.png")) < 100_000
    assert "neither PNG, JPEG nor WebP" in inline_image(tmp_path / "foreign.bin")
    assert "<img" not in inline_image(tmp_path / "broken.bin")
    assert "No such file" in inline_image(tmp_path / "missing.png")


@given(st.text())
def test_escape_leaves_no_markup(text: str) -> None:
    assert not re.search(r"[<>\"'\x00-\x08\x0b-\x1f]", escape(text))


def _parse(table: str) -> dict[str, list[str]]:
    lines = [re.split(r"\s{2,}", line) for line in table.splitlines() if not line.startswith("-")]
    return {line[0]: line[1:] for line in lines[1:]}


def test_summary_of_a_whole_run(tmp_path: Path) -> None:
    write_run(tmp_path)
    rows = _parse(summary_table(tmp_path))
    assert list(rows) == [*sorted(TASKS), "mean"]
    metrics = read_metrics(tmp_path)
    first = sum(record["accuracy/read"] for record in metrics[:10]) / 10
    last = sum(record["accuracy/read"] for record in metrics[-10:]) / 10
    assert rows["read"] == [
        f"{first:.3f}",
        f"{last:.3f}",
        f"{last - first:+.3f}",
        "0.550 ± 0.085",
        "0.700 ± 0.085",
        "+0.150",
        "128",
    ]
    assert rows["mean"][3:] == [
        f"0.600 ± {0.085 / math.sqrt(5):.3f}",
        f"0.750 ± {0.085 / math.sqrt(5):.3f}",
        "+0.150",
        "640",
    ]
    assert len({len(line) for line in summary_table(tmp_path).splitlines()}) == 1


def test_summary_weighs_steps_by_their_rollouts() -> None:
    records = [
        {"step": 0, "accuracy/a": 1.0, "counts": {"accuracy/a": 1}},
        {"step": 1, "accuracy/a": 0.0, "counts": {"accuracy/a": 3}},
    ]
    assert summarize(records, []).rows[0].first == 0.25


def test_summary_says_what_is_missing(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=None)
    for step in range(3):
        writer.write(stats(step, tasks=("count", "read")))
    writer.write(StepStats(step=3, means={"accuracy/read": Mean(total=0, count=0)}, scalars={}, seconds={}))
    EvaluationLog(tmp_path, resume_step=None).write(
        0, "before", {"count": {"accuracy": 0.5, "count": 8, "half_width": 0.3}}, 0.0
    )
    table = summary_table(tmp_path)
    rows = _parse(table)
    assert rows["count"][3:] == ["0.500 ± 0.300", "-", "-", "8"]
    assert rows["read"][3:] == ["-", "-", "-", "-"]
    assert rows["mean"][3:] == ["-", "-", "-", "-"]
    assert rows["mean"][0] != "-"
    assert "- rollouts: only 4 steps" in table
    assert "- held-out before: no items of read" in table
    assert '- held-out after: no greedy evaluation labelled "after"' in table


def test_summary_of_nothing(tmp_path: Path) -> None:
    table = summary_table(tmp_path)
    assert _parse(table) == {"mean": ["-"] * 7}
    assert "no step was recorded" in table


def test_sampled_evaluations_do_not_pass_for_greedy_ones() -> None:
    item = {"a": {"accuracy": 0.9, "count": 8, "half_width": 0.2}}
    sampled = {"step": 0, "label": "before", "temperature": 1.0, "tasks": item}
    assert summarize([], [sampled]).rows[0].before is None


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_rising_and_inside(low: float, size: float) -> None:
    found = ticks(low, low + size)
    assert 2 <= len(found) <= 7
    assert all(a < b for a, b in pairwise(found))
    assert found[0] >= low - 1e-6 * size
    assert found[-1] <= low + size + 1e-6 * size


def test_thin_and_smooth_keep_the_mean() -> None:
    points = [(float(x), float(x % 7)) for x in range(1200)]
    few = thin(points, 400)
    assert len(few) == 400
    assert sum(y for _, y in few) / 400 == pytest.approx(sum(y for _, y in points) / 1200)
    assert smooth([(0.0, 0.0), (1.0, 3.0), (2.0, 6.0)], 1) == [(0.0, 1.5), (1.0, 3.0), (2.0, 4.5)]


@pytest.mark.parametrize(
    "values", [[1.0], [2.0, 2.0], [0.0, 0.0], [None, 1.0, None, 3.0], [1.7e308, -1.7e308, 1.0, 2.0], [-1e-300, 1e-300]]
)
def test_charts_of_awkward_values_have_finite_coordinates(values: list[float | None]) -> None:
    chart = line_chart("<t>", [Series(name="<s>", points=list(enumerate(values)))])
    assert "nan" not in chart
    assert "inf" not in chart
    numbers = [
        float(text)
        for attribute in re.findall(r'(?:cx|cy|points|x1|y1|x|y)="([^"]+)"', chart)
        for text in re.split("[ ,]", attribute)
    ]
    assert numbers
    assert all(-5 <= number <= 400 for number in numbers)
    assert "<t>" not in chart
    assert "<s>" not in chart


def test_chart_without_values_says_so() -> None:
    assert "nothing recorded" in line_chart("empty", [Series(name="a", points=[(0, None)])])
