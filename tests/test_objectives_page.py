"""The page of the objectives shows what the code gives: its table and pictures are made anew and compared."""

from __future__ import annotations

from tools.objectives_figure import DRAWN, PAGE, by_kind, charts, table
from tools.pages import replace_parts


def test_table_and_pictures_are_new() -> None:
    found = by_kind()
    page = PAGE.read_text(encoding="utf-8")
    assert replace_parts(page, {"figure": table(found)}) == page, "run tools/objectives_figure.py --write"
    for name, picture in charts(found).items():
        assert (PAGE.parent / name).read_text(encoding="utf-8") == picture, "run tools/objectives_figure.py --write"
        assert f"]({name})" in page


def test_the_picture_holds_what_the_text_says_of_ranks() -> None:
    """Whatever the scale of a reward, G2RPO's advantages stay where a normal score is; Dr. GRPO's do not."""
    found = by_kind()
    for of_task in found["g2rpo"].values():
        assert abs(of_task).max() < DRAWN
        assert abs(of_task.mean()) < 0.1
    assert abs(found["dr_grpo"]["heavy"]).max() > 10
    # tie-free tasks weigh alike, however far apart their rewards' scales are
    overlap, heavy = (found["g2rpo"][name].var() for name in ("overlap", "heavy"))
    assert abs(overlap / heavy - 1) < 1e-3
