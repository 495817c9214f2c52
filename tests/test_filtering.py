"""Dynamic filtering: which groups are kept, and what is said of the others."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlrl.algorithms.filtering import FILTERS, filter_groups
from megatron_vlrl.errors import ConfigError

NAN = math.nan
GROUPS = {
    2: [1.0, 1.0, 1.0],  # right
    3: [0.0, 0.0],  # wrong
    5: [1.0, 0.0, 1.0],
    8: [0.5, 0.5, 0.5],  # all alike, but not right and not wrong
    9: [NAN, 1.0, 0.0],
    11: [NAN, NAN],
    12: [1.0, NAN],  # right, as far as known
    14: [0.5, 0.5 + 5e-7],  # noise
    15: [0.5, 0.5 + 5e-6],
    20: [0.005, 0.0],  # differs, but its mean is under the band
}
EXPECTED = {
    "off": (list(GROUPS), [], [], []),
    "std": ([5, 9, 15, 20], [2, 12], [3], [8, 11, 14]),
    "mean_band": ([5, 8, 9, 14, 15], [2, 12], [3, 20], [11]),
}


def columns(groups: dict[int, list[float]]) -> tuple[np.ndarray, np.ndarray]:
    accuracy = np.array([value for values in groups.values() for value in values])
    return accuracy, np.repeat(list(groups), [len(values) for values in groups.values()]).astype(np.int64)


@pytest.mark.parametrize("rule", list(FILTERS))
def test_what_a_rule_keeps(rule: str) -> None:
    filtered = filter_groups(*columns(GROUPS), rule)
    assert tuple(getattr(filtered, name).tolist() for name in ("kept", "right", "wrong", "neither")) == EXPECTED[rule]


@settings(deadline=None)
@given(
    st.dictionaries(
        st.integers(0, 50), st.lists(st.sampled_from([0.0, 0.25, 1.0, NAN]), min_size=1, max_size=5), max_size=8
    ),
    st.sampled_from(list(FILTERS)),
)
def test_every_group_is_in_exactly_one_place(groups: dict[int, list[float]], rule: str) -> None:
    groups = dict(sorted(groups.items()))
    filtered = filter_groups(*columns(groups), rule)
    parts = [getattr(filtered, name).tolist() for name in ("kept", "right", "wrong", "neither")]
    assert sorted(group for part in parts for group in part) == list(groups)
    if rule == "std":
        assert parts[0] == [g for g, v in groups.items() if len({x for x in v if not math.isnan(x)}) > 1]


def test_an_unknown_rule_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="mean_band"):
        filter_groups(*columns(GROUPS), "meanband")
