"""Objectives are compared seed by seed; every run is shown, finished ones are kept; the recipes can run."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from megatron_vlrl.algorithms import check_options
from megatron_vlrl.algorithms.losses import check_loss_options
from megatron_vlrl.config.checks import check
from megatron_vlrl.config.load import load
from tests.test_seeds_table import fake, rows_of
from tools.compare_objectives import OBJECTIVES, RECIPE, main

HELD_OUT = {"grpo": [0.6, 0.55, 0.75], "g2rpo": [0.7, 0.65, 0.8]}


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_every_objective_is_a_recipe_that_a_run_would_take(name: str) -> None:
    config = load(RECIPE, OBJECTIVES[name])
    check(config)
    check_options(config.algorithm.advantage.kind, config.algorithm.advantage.options)
    check_loss_options(config.algorithm.loss.kind, config.algorithm.loss.options)


def test_finished_runs_are_kept_and_compared_seed_by_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, after in HELD_OUT.items():
        for seed, value in enumerate(after):
            folder = tmp_path / f"{name}-seed{seed}"
            folder.mkdir()
            fake(folder, seed, held_out=(0.5, value))
            (folder / "hf").mkdir()  # finished: nothing is trained again
    assert main(["--objectives", "grpo", "g2rpo", "--seeds", "0", "1", "2", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = rows_of(out)
    gains = [value - 0.5 for value in HELD_OUT["grpo"]]
    mean, deviation = statistics.fmean(gains), statistics.stdev(gains)
    assert rows["grpo"][:5] == [
        "3",
        "+0.200 ± 0.000",
        "0.500 ± 0.000",
        "0.633 ± 0.104",
        f"{mean:+.3f} ± {deviation:.3f}",
    ]
    assert rows["grpo"][5] == ""
    assert rows["g2rpo"][5] == "+0.083 ± 0.029"  # of 0.1, 0.1 and 0.05: the seeds' own spread is gone
    runs = [line for line in out.splitlines() if line.startswith("| g")][2:]
    assert [line.split("|")[1:3] for line in runs] == [
        [f" {name} ", f" {seed} "] for name in ("grpo", "g2rpo") for seed in range(3)
    ]
    assert (tmp_path / "objectives.svg").read_text().count("<polyline") >= 2
