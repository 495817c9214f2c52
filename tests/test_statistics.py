"""What a step reports: means by task with their denominators, NaN left out, updates joined by their tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_vlrl.backends.protocol import UpdateResult
from megatron_vlrl.train.statistics import table_means, update_means
from megatron_vlrl.types import AdvantageResult, Mean, RewardTable

NAN = math.nan
TABLE = RewardTable(
    position=np.array([0, 0, 1, 1, 2]),
    rollout=np.array([0, 1, 0, 1, 0]),
    task=np.array([0, 0, 2, 2, 0]),
    total=np.array([1.0, 0.5, NAN, 0.25, 0.0]),
    components=np.array([[1.0, NAN], [0.0, NAN], [NAN, NAN], [NAN, 0.75], [0.5, NAN]]),
    length=np.array([3, 5, 2, 2, 7]),
    task_names=("count", "absent", "read"),
    component_names=("accuracy", "overlap"),
)
FLAGS = AdvantageResult(
    values=np.zeros(5),
    uniform=np.array([False, False, False, False, True]),
    tied=np.array([True, True, False, False, False]),
    dropped=np.array([False, False, True, False, False]),
)


def test_means_of_a_table() -> None:
    means = table_means(TABLE, FLAGS)
    expected = {
        "reward": Mean(total=1.75, count=4),
        "length": Mean(total=19, count=5),
        "reward/count": Mean(total=1.5, count=3),
        "reward/read": Mean(total=0.25, count=1),
        "length/count": Mean(total=15, count=3),
        "length/read": Mean(total=4, count=2),
        "accuracy/count": Mean(total=1.5, count=3),
        "overlap/read": Mean(total=0.75, count=1),
        "uniform/count": Mean(total=1, count=3),
        "tied/count": Mean(total=2, count=3),
        "failed/count": Mean(total=0, count=3),
        "failed/read": Mean(total=1, count=2),
    }
    assert {name: means[name] for name in expected} == expected
    assert not [name for name in means if name.endswith("/absent")]


def update(tokens: tuple[float, float], entropy: tuple[float, float], kl: float, norm: float) -> UpdateResult:
    sums = {
        "loss": 0.5,
        "tokens": sum(tokens),
        "policy_kl": kl,
        "tokens/count": tokens[0],
        "tokens/read": tokens[1],
        "entropy/count": entropy[0],
        "entropy/read": entropy[1],
    }
    return UpdateResult(sums=sums, maxima={}, grad_norm=norm, skipped=None)


def test_means_of_updates_are_over_tokens_of_all_of_them() -> None:
    updates = [update((10, 0), (5.0, 0.0), kl=2.0, norm=1.0), update((30, 0), (3.0, 0.0), kl=6.0, norm=2.0)]
    means = update_means(updates, ("count", "read"))
    assert means == {
        "entropy/count": Mean(total=8.0, count=40),
        "entropy": Mean(total=8.0, count=40),
        "policy_kl": Mean(total=8.0, count=40),
        # Only the first update looks at the weights that wrote the rollouts.
        "mismatch_kl": Mean(total=2.0, count=10),
        "grad_norm": Mean(total=3.0, count=2),
        "loss": Mean(total=1.0, count=2),
    }


def test_means_of_shards_join_exactly() -> None:
    assert Mean(total=3.0, count=2) + Mean(total=1.0, count=6) == Mean(total=4.0, count=8)
    assert (Mean(total=3.0, count=2) + Mean(total=1.0, count=6)).value == pytest.approx(0.5)
    assert math.isnan(Mean(total=0.0, count=0).value)
