"""The row that each task has in the report: pooled over the last steps, held against its bands."""

from __future__ import annotations

from typing import Any

from megatron_vlrl.observe.picture import HEADINGS, picture

SETTINGS = {
    "reward": {"length_bands": {"count": [0, 4, 12, 20]}},
    "algorithm": {"entropy": {"bands": {"count": [0.2, 0.6]}}},
}


def record(step: int, **values: float) -> dict[str, Any]:
    named = {name.replace("__", "/"): value for name, value in values.items()}
    return {"step": step, **named, "counts": dict.fromkeys(named, step)}


METRICS = [
    *(record(step, accuracy__count=0.0) for step in range(1, 4)),  # before the last ten
    *(
        record(
            step,
            accuracy__count=0.5,
            format__count=1.0,
            advantage__count=0.0,
            advantage_var__count=0.75,
            uniform__count=0.25,
            tied__count=0.5,
            decided_accuracy__count=0.9,
            decided_length__count=0.1,
            response_length__count=14.0,
            under_envelope__count=0.0,
            over_envelope__count=0.6,
            entropy__count=0.7,
            entropy_side__count=1.0,
            clip_fraction__count=0.02,
            mismatch_kl__count=2e-6,
            entropy__read=0.4,
        )
        | {"advantage_max/count": step / 10, "effective_n/count": 6.0}
        for step in range(4, 14)
    ),
]


def test_a_row_holds_what_the_last_steps_measured() -> None:
    count, read = (dict(zip(HEADINGS, row, strict=True)) for row in picture(METRICS, ("count", "read"), SETTINGS))
    assert count == {
        "task": "count",
        "components": "accuracy 0.5, format 1",
        "advantage mean, variance, max": "0, 0.75, 1.3",
        "uniform, tied": "25%, 50%",
        "effective N": "6",
        "ranks decided by": "accuracy 90%, length 10%",
        "tokens (envelope)": "14 (0 to 20; 0% short, 60% long of its flat part)",
        "entropy (band)": "0.7 (0.2 to 0.6; pushed down)",
        "clipped": "2%",
        "mismatch KL": "2e-6",
    }
    assert read["entropy (band)"] == "0.4"  # no band, so none is shown
    assert read["ranks decided by"] == read["components"] == read["clipped"] == "-"


def test_steps_count_as_many_times_as_they_had_rollouts() -> None:
    steps = [
        {"step": 1, "clip_fraction/a": 0.0, "counts": {"clip_fraction/a": 30}},
        {"step": 2, "clip_fraction/a": 1.0, "counts": {"clip_fraction/a": 10}},
        {"step": 3, "counts": {}},  # skipped
    ]
    ((*_, clipped, _),) = picture(steps, ("a",), {})
    assert clipped == "25%"
    assert picture([], ("a",), {}) == [("a", "-", "-, -, -", "-, -", *["-"] * 6)]
