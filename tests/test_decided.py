"""Which component of the reward decides the ranks."""

from __future__ import annotations

import math

import numpy as np

from megatron_vlrl.algorithms.decided import deciding_component

NAN = math.nan


def test_the_greatest_part_of_each_step_between_neighbours_decides_it() -> None:
    # accuracy, length; weights .9 and .1
    components = np.array([[1.0, 0.2], [0.0, 1.0], [1.0, 0.5], [0.0, 1.0], [NAN, 1.0], [0.5, NAN], [0.25, NAN]])
    weights = np.array([[0.9, 0.1]] * 5 + [[1.0, 0.0]] * 2)
    totals = np.nansum(components * weights, axis=1)
    totals[4] = NAN  # failed
    groups = np.array([7, 7, 7, 7, 7, 9, 9])
    decided = deciding_component(totals, components, weights, groups)
    # group 7, ascending: two ties (lowest), then row 0 over them by accuracy, then row 2 over row 0 by length
    assert decided.tolist() == [0, -1, 1, -1, -1, 0, -1]


def test_a_small_shaping_term_decides_every_rank_of_equally_right_answers() -> None:
    lengths = np.arange(8) / 8
    components = np.stack([np.ones(8), lengths], axis=1)
    weights = np.tile([0.99, 0.01], (8, 1))
    decided = deciding_component((components * weights).sum(1), components, weights, np.zeros(8, np.int64))
    assert decided.tolist() == [-1] + [1] * 7


def test_nothing_to_decide() -> None:
    none = np.zeros((0, 2))
    assert deciding_component(np.zeros(0), none, none, np.zeros(0, np.int64)).tolist() == []
    failed = np.full((2, 1), NAN)
    assert deciding_component(failed[:, 0], failed, np.zeros((2, 1)), np.zeros(2, np.int64)).tolist() == [-1, -1]
    bare = np.zeros((2, 0))
    assert deciding_component(np.array([0.0, 1.0]), bare, bare, np.zeros(2, np.int64)).tolist() == [-1, -1]
