"""What a step reports: means by task with their denominators, NaN left out, updates joined by their tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_vlrl.backends.protocol import UpdateResult
from megatron_vlrl.train.quantiles import BINS
from megatron_vlrl.train.statistics import (
    advantage_means,
    advantage_scalars,
    envelope_means,
    reward_means,
    update_means,
    update_scalars,
    why_skipped,
)
from megatron_vlrl.types import AdvantageResult, Mean, RewardTable

NAN = math.nan
TABLE = RewardTable(
    position=np.array([0, 0, 1, 1, 2]),
    rollout=np.array([0, 1, 0, 1, 0]),
    task=np.array([0, 0, 2, 2, 0]),
    total=np.array([1.0, 0.5, NAN, 0.25, 0.0]),
    components=np.array([[1.0, NAN], [0.0, NAN], [NAN, NAN], [NAN, 0.75], [0.5, NAN]]),
    weights=np.array([[0.9, 0.0], [0.9, 0.0], [0.0, 0.0], [0.0, 0.5], [0.9, 0.0]]),
    length=np.array([3, 5, 2, 2, 7]),
    peers=np.array(["count", "count", "read", "read", "count"]),
    task_names=("count", "absent", "read"),
    component_names=("accuracy", "overlap"),
)
FLAGS = AdvantageResult(
    values=np.array([1.0, -1.0, 0.0, 0.5, 0.0]),
    uniform=np.array([False, False, False, False, True]),
    tied=np.array([True, True, False, False, False]),
    dropped=np.array([False, False, True, False, False]),
)


def test_means_of_the_rewards_of_all_rounds() -> None:
    means = reward_means([TABLE])
    expected = {
        "reward": Mean(total=1.75, count=4),
        "response_length": Mean(total=19, count=5),
        "reward/count": Mean(total=1.5, count=3),
        "reward/read": Mean(total=0.25, count=1),
        "response_length/count": Mean(total=15, count=3),
        "response_length/read": Mean(total=4, count=2),
        "accuracy/count": Mean(total=1.5, count=3),
        "overlap/read": Mean(total=0.75, count=1),
        "failed/count": Mean(total=0, count=3),
        "failed/read": Mean(total=1, count=2),
    }
    assert {name: means[name] for name in expected} == expected
    assert not [name for name in means if name.endswith("/absent")]
    twice = reward_means([TABLE, TABLE])
    assert twice.keys() == means.keys()
    assert all(twice[name] == mean + mean for name, mean in means.items())


def test_lengths_against_the_flat_part_of_their_envelope() -> None:
    means = envelope_means([TABLE], {"count": (0, 4, 6, 9), "absent": (0, 1, 2, 3)})
    assert means == {"under_envelope/count": Mean(total=1, count=3), "over_envelope/count": Mean(total=1, count=3)}


def test_what_the_advantages_look_like() -> None:
    means = advantage_means(TABLE, FLAGS)
    expected = {
        "uniform/count": Mean(total=1, count=3),
        "tied/count": Mean(total=2, count=3),
        "advantage/count": Mean(total=0, count=3),
        "advantage_var/count": Mean(total=2, count=3),
        "advantage/read": Mean(total=0.5, count=2),
        "advantage_var/read": Mean(total=0.125, count=2),
        "decided_accuracy/count": Mean(total=1, count=1),
        "decided_overlap/count": Mean(total=0, count=1),
    }
    assert {name: means[name] for name in expected} == expected
    assert not [
        name for name in means if name.startswith("decided") and name.endswith("/read")
    ]  # no step between ranks
    scalars = advantage_scalars(TABLE, FLAGS)
    assert scalars["advantage_max/count"] == 1.0
    assert scalars["effective_n/count"] == 2
    assert scalars["effective_n/read"] == 1
    assert scalars["advantage_p50/count"] == 0.0


def update(tokens: tuple[float, float], entropy: tuple[float, float], kl: float, norm: float) -> UpdateResult:
    counts = np.zeros((2, BINS))
    counts[0, BINS // 2] = tokens[0]
    sums = {
        "loss": np.array(0.5),
        "tokens": np.array(tokens),
        "entropy": np.array(entropy),
        "policy_kl": np.array([kl, 0.0]),
        "mismatch_kl": np.array([kl / 2, 0.0]),
        "fresh": np.array([tokens[0] / 2, 0.0]),
        "ratios": counts,
        "mismatches": counts,
    }
    return UpdateResult(sums=sums, maxima={"drift": kl / 8}, grad_norm=norm, skipped=None)


UPDATES = [update((10, 0), (5.0, 0.0), kl=2.0, norm=1.0), update((30, 0), (3.0, 0.0), kl=6.0, norm=2.0)]


def test_means_of_updates_are_over_tokens_of_all_of_them() -> None:
    means = update_means(UPDATES, ("count", "read"))
    assert means == {
        "entropy/count": Mean(total=8.0, count=40),
        "entropy": Mean(total=8.0, count=40),
        "policy_kl": Mean(total=8.0, count=40),
        "policy_kl/count": Mean(total=8.0, count=40),
        # Only the first update looks at the weights that wrote the rollouts, and only these tell of a mismatch.
        "mismatch_kl": Mean(total=1.0, count=5),
        "mismatch_kl/count": Mean(total=1.0, count=5),
        "grad_norm": Mean(total=3.0, count=2),
        "loss": Mean(total=1.0, count=2),
    }
    assert update_means([], ("count", "read")) == {}


def test_scalars_of_updates() -> None:
    assert update_scalars(UPDATES, ("count", "read")) == {
        "mismatch_max": 0.25,
        "ratio_p01/count": 1.0,
        "ratio_p99/count": 1.0,
        "mismatch_ratio_p01/count": 1.0,
        "mismatch_ratio_p99/count": 1.0,
    }
    assert update_scalars([], ("count", "read")) == {}


def test_why_a_step_was_skipped() -> None:
    assert why_skipped([]) == "no group has rewards that differ"
    assert why_skipped(UPDATES) is None
    stopped = [replace(one, skipped="non-finite loss") for one in UPDATES]
    assert why_skipped([UPDATES[0], stopped[0]]) == "non-finite loss"
    assert why_skipped(stopped) == "non-finite loss; non-finite loss"


def test_means_of_shards_join_exactly() -> None:
    assert Mean(total=3.0, count=2) + Mean(total=1.0, count=6) == Mean(total=4.0, count=8)
    assert (Mean(total=3.0, count=2) + Mean(total=1.0, count=6)).value == pytest.approx(0.5)
    assert math.isnan(Mean(total=0.0, count=0).value)
