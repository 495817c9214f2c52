"""Quantiles of ratios from counts that add up over shards: right to the width of a bin."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_vlrl.train.quantiles import BINS, log_ratio_counts, ratio_quantile

WIDTH = 10.0**0.125  # of a bin


def counts(values: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    kept = np.ones(len(values)) if counted is None else counted
    task = torch.zeros(len(values), dtype=torch.int64)
    return log_ratio_counts(torch.tensor(values), task, torch.tensor(kept), 1).numpy()[0]


@pytest.mark.parametrize("share", [0.01, 0.3, 0.45, 0.9, 0.99])
@pytest.mark.parametrize("scale", [1e-5, 0.03, 2.0])
def test_a_quantile_is_right_to_its_bin_and_never_nearer_to_one(share: float, scale: float) -> None:
    values = np.random.default_rng(0).normal(0.0, scale, 20_000)
    exact = np.quantile(values, share, method="inverted_cdf")
    found = math.log(ratio_quantile(counts(values), share))
    assert abs(exact) <= abs(found) <= abs(exact) * WIDTH * (1 + 1e-9)
    assert np.sign(found) == np.sign(exact)


def test_shards_and_tasks_add_up_and_fillers_do_not_count() -> None:
    random = np.random.default_rng(1)
    values, task = random.normal(size=500), torch.tensor(random.integers(0, 3, 500))
    counted = torch.tensor(random.integers(0, 2, 500)).float()
    whole = log_ratio_counts(torch.tensor(values), task, counted, 3)
    parts = [log_ratio_counts(torch.tensor(values[s]), task[s], counted[s], 3) for s in (slice(0, 77), slice(77, 500))]
    assert torch.equal(whole, parts[0] + parts[1])
    assert whole.shape == (3, BINS)
    assert whole.sum(1).tolist() == [float(counted[task == n].sum()) for n in range(3)]


def test_the_ends() -> None:
    assert math.isnan(ratio_quantile(np.zeros(BINS), 0.5))
    assert ratio_quantile(counts(np.zeros(3)), 0.99) == 1.0
    assert 0.0 < ratio_quantile(counts(np.array([-1e4])), 0.01) < 1e-7
    assert 1e7 < ratio_quantile(counts(np.array([1e4])), 0.99) < math.inf
