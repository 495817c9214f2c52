"""Whole runs of filtering, EMA-GRPO, a moving reference and schedules: the same for every layout, and when resumed."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_vlrl.checkpoint.state import STATE_FILE
from megatron_vlrl.checkpoint.waiting import WAITING_FILE
from tests.mixed_answers import ENGINE, TASKS, write_shards
from tests.run_folder import (
    Inputs,
    differences,
    folder_bytes,
    inputs,  # noqa: F401 - a fixture
    records,
    run,
    train,
    write_config,
)

pytestmark = pytest.mark.slow

SAMPLES, WANTED = 4, 4  # responses to a prompt, groups of a step
# What is drawn, round by round: Mixed, Right and Wrong answers, a Bad image. Only mixed groups are kept.
ROUNDS = {
    1: ["MRMW", "MMMM"],  # keeps 0 2, 4 5 6 7
    2: ["MW", "MMMM"],  # beside 6 and 7, keeps 8, 10 11 12 13
    3: ["B", "RRWW", "WRWR"],  # beside 11 to 13, nothing, and then the rounds are spent
    4: ["RWRW", "RRRR", "WWWW"],  # nothing at all
    5: ["MMBM", "MMMM"],  # keeps 35 36 38, 39 40 41 42
}
TRAINED = {1: [0, 2, 4, 5], 2: [6, 7, 8, 10], 3: [11, 12, 13], 4: [], 5: [35, 36, 38, 39]}
STEPS, SAVED = 5, 2  # three groups wait in the checkpoint of step 2
EMPTY = "no group has rewards that differ"

FILTERED = {"filter": {"rule": "std", "refill_rounds": 2}}
MOVING = {"kl": {"reference": "ema", "decay": 0.5, "estimator": "k3", "coefficient": 0.05}}
ENTROPY = {"entropy": {"coefficient": 0.02, "bands": {task: [0.1, 0.2] for task in TASKS}}}
SCHEDULES = {
    "algorithm.entropy.coefficient": {"kind": "linear", "start": 0.02, "end": 0.0},
    f"algorithm.kl.by_task.{TASKS[0]}": {"kind": "grpo_d", "min": 0.04, "max": 0.1},
}


def _ema_grpo(variant: str) -> dict[str, Any]:
    return {"advantage": {"kind": "ema_grpo", "options": {"variant": variant, "decay": 0.5}}}


# Each for itself, in as few steps as can show it; and all together.
KINDS = {
    "onethinker": {"algorithm": _ema_grpo("onethinker")},
    "paper": {"algorithm": _ema_grpo("paper")},
    "carried": {"algorithm": FILTERED},
    "reference and schedules": {"algorithm": {**MOVING, **ENTROPY}, "schedules": SCHEDULES},
    "everything": {
        "algorithm": {**FILTERED, **MOVING, **ENTROPY, **_ema_grpo("onethinker")},
        "schedules": SCHEDULES,
        "train": {"steps": STEPS, "minibatches": 2},
    },
}
LAYOUTS = {"one process": [], "data=2": ["parallel.data=2"], "tensor=2": ["parallel.tensor=2"]}


@pytest.fixture(scope="module")
def shards(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Samples whose answers are what ROUNDS says."""
    script = "".join(drawn for step in ROUNDS.values() for drawn in step)
    return write_shards(tmp_path_factory.mktemp("mixed"), inputs, script)


@pytest.fixture(scope="module")
def start(inputs: Inputs, shards: Path, tmp_path_factory: pytest.TempPathFactory):  # noqa: F811
    """Run a kind on a layout: the run's folder, in which the checkpoints of step 2 and later stay."""

    def run_it(kind: str, layout: str, *overrides: str) -> Path:
        root = tmp_path_factory.mktemp("run")
        config = write_config(
            root / "run.yaml",
            inputs,
            **{
                "data": {"train": str(shards), "prompts_per_step": WANTED},
                "rollout": {"engine": ENGINE, "samples_per_prompt": SAMPLES, "max_new_tokens": 6},
                "reward": {"length_weight": 0.0},
                # Of a gradient that is rounding alone, Adam's own eps would make a whole step.
                "optimizer": {"lr": 1.0e-3, "eps": 1.0e-5},
                "train": {"steps": SAVED + 1},
                "evaluate": {"data": ""},
                "checkpoint": {"every": SAVED, "keep": 3},
                **KINDS[kind],
            },
        )
        argv = train(config, *LAYOUTS[layout], *overrides)
        run(argv, 2 if LAYOUTS[layout] else 1, root / "out").ok()
        return root / "run"

    return run_it


@pytest.fixture(scope="module")
def whole(start):
    """The folder of a run that was never interrupted; each made once."""
    return functools.cache(start)


def _saved(folder: Path) -> Path:
    return folder / f"checkpoints/step-{SAVED:08d}"


def _from(folder: Path) -> str:
    return f"run.resume={_saved(folder)}"


def _advantage_state(folder: Path) -> dict[str, Any]:
    return json.loads((_saved(folder) / STATE_FILE).read_text())["algorithm"]["advantage"]


def _assert_goes_on_as(resumed: Path, folder: Path) -> None:
    """All that the resumed run did is what the other did after the checkpoint, bit by bit."""
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        later = [line for line in records(folder, name) if line["step"] > SAVED]
        assert records(resumed, name) == later, name
    assert records(resumed)[0]["step"] == SAVED + 1
    assert folder_bytes(resumed / "hf") == folder_bytes(folder / "hf")


def _assert_same_step(one: dict[str, Any], other: dict[str, Any]) -> None:
    """As in test_run_layouts: what a layout may change is how even the work is, and rounding."""
    for step in (one, other):
        assert step.pop("mismatch_max", 0.0) < 1e-4
        assert step.pop("balance/before") >= step.pop("balance/after") >= 1.0
    assert not differences(one, other, relative=1e-4, absolute=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "everything"])
def test_each_state_is_saved_and_restored(whole, start, kind):
    folder = whole(kind, "one process")
    _assert_goes_on_as(start(kind, "one process", _from(folder)), folder)
    last = records(folder)[-1]
    assert set(_advantage_state(folder)) == (set(TASKS) if kind in ("onethinker", "paper") else set())
    assert (_saved(folder) / WAITING_FILE).exists() == (kind == "carried") == (last.get("filter/carried", 0) > 0)
    assert (last.get("reference_kl", 0) > 1e-3) == (kind == "reference and schedules")


@pytest.mark.parametrize("layout", ["data=2", "tensor=2"])
def test_all_states_together_are_saved_and_restored(whole, start, layout):
    folder = whole("everything", layout)
    _assert_goes_on_as(start("everything", layout, _from(folder)), folder)


def test_another_number_of_data_ranks_goes_on_with_the_same_run(whole, start):
    resumed = start("everything", "one process", _from(whole("everything", "data=2")))
    for layout in ("one process", "data=2"):
        later = records(whole("everything", layout))[SAVED:]
        for one, other in zip(records(resumed), later, strict=True):
            print({k: v for k, v in differences(one, other, relative=1e-7, absolute=1e-8).items() if k[:3] != "bal"})
            _assert_same_step(one, other)


def test_groups_that_wait_are_enough_for_a_smaller_step(whole, start):
    """Three wait, and a step is now of two: the first needs no rollouts, the second goes on with the data."""
    resumed = start(
        "carried", "one process", _from(whole("carried", "one process")), "data.prompts_per_step=2", "train.steps=4"
    )
    steps = records(resumed)
    names = ("filter/carried", "filter/rounds", "filter/drawn", "filter/short")
    assert [[step[name] for name in names] for step in steps] == [[3, 0, 0, 0], [1, 3, 4, 1]]
    lines = records(resumed, "rollouts.jsonl")
    assert [(line["step"], int(line["key"])) for line in lines] == [(3, 11), (3, 12), (4, 13)]
    assert "reward" not in steps[0]  # of what was written for the step: nothing


@pytest.mark.parametrize("layout", ["data=2", "tensor=2"])
def test_every_layout_is_the_same_run(whole, layout):
    ours, theirs = (records(whole("everything", name)) for name in (layout, "one process"))
    for one, other in zip(ours, theirs, strict=True):
        _assert_same_step(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_kept_is_trained_once_and_in_order(whole, layout):
    folder, ranks = whole("everything", layout), 2 if layout == "data=2" else 1
    trained: dict[int, list[int]] = {step: [] for step in TRAINED}
    for line in records(folder, "rollouts.jsonl"):  # of the first data rank
        trained[line["step"]].append(int(line["key"]))
    assert trained == {step: [p for p in positions if p % ranks == 0] for step, positions in TRAINED.items()}
    for step in records(folder):  # of all of them
        counts = {name: n for name, n in step["counts"].items() if name.startswith("advantage/")}
        assert sum(counts.values()) == SAMPLES * len(TRAINED[step["step"]])


def test_what_became_of_each_group_is_counted(whole):
    waiting = bad = 0
    for step in records(whole("everything", "one process")):
        rounds, trained = ROUNDS[step["step"]], TRAINED[step["step"]]
        count = Counter("".join(rounds))
        bad += count["B"]
        expected = {"drawn": count.total() - count["B"], "kept": count["M"], "right": count["R"], "wrong": count["W"]}
        expected |= {"neither": 0, "rounds": len(rounds), "carried": waiting, "short": WANTED - len(trained)}
        assert {n.removeprefix("filter/"): v for n, v in step.items() if n.startswith("filter/")} == expected
        assert step["counts"]["reward"] == SAMPLES * expected["drawn"]
        assert step["bad_samples"] == bad
        waiting += count["M"] - len(trained)
    assert waiting == 3


def test_a_step_whose_groups_are_all_filtered_takes_no_optimizer_step(whole):
    steps = records(whole("everything", "one process"))
    assert [step["skipped"] for step in steps] == [None, None, None, EMPTY, None]
    assert [step["updates"] for step in steps] == [2, 4, 6, 6, 8]
    assert "grad_norm" not in steps[3]


def test_carried_groups_are_not_held_against_weights_that_did_not_write_them(whole):
    folder = whole("carried", "one process")
    for step, stale in zip(records(folder), (0, 2, 3), strict=True):
        lines = [line for line in records(folder, "rollouts.jsonl") if line["step"] == step["step"]]
        written = [rollout for line in lines for rollout in line["rollouts"]]
        fresh = sum(rollout["tokens"] for rollout in written if rollout["weight_version"] == step["step"] - 1)
        assert sum(rollout["weight_version"] < step["step"] - 1 for rollout in written) == SAMPLES * stale
        assert step["counts"].get("mismatch_kl", 0) == fresh < step["counts"]["importance"] + (stale == 0)
        assert ("mismatch_max" in step) == (fresh > 0)
        assert step.get("mismatch_max", 0.0) < 1e-4
        # They are corrected for it: the weights have moved since.
        assert (abs(step["importance"] - 1) > 1e-3) == (stale > 0)
