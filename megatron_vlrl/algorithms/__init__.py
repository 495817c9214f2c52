"""Rewards -> advantages, shaping and schedules: pure functions, torch-free but for `losses`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_vlrl.algorithms.columns import RewardColumns, reward_columns
from megatron_vlrl.algorithms.g2rpo import g2rpo
from megatron_vlrl.algorithms.grpo import grpo
from megatron_vlrl.algorithms.ones import ones
from megatron_vlrl.config.names import resolve_name, unknown_name
from megatron_vlrl.errors import ConfigError, TrainingError
from megatron_vlrl.types import AdvantageResult

__all__ = ["ADVANTAGES", "AdvantageResult", "RewardColumns", "advantages", "check_options"]

# (columns, *, its own options) -> one advantage for each row, in their order
Method = Callable[..., AdvantageResult]

ADVANTAGES: dict[str, Method] = {"g2rpo": g2rpo, "grpo": grpo, "ones": ones}


def advantages(
    rewards: ArrayLike,
    tasks: ArrayLike,
    groups: ArrayLike,
    kind: str = "g2rpo",
    components: ArrayLike | None = None,
    **options: Any,
) -> AdvantageResult:
    """One advantage for each rollout, in the order given; the same bits for any order of the rows.

    rewards: N numbers; NaN or infinite where a verifier failed. tasks, groups: N integers or strings; a group is the
    rows of one task with one group id. kind: a name in ADVANTAGES, or a user's `package.module:function`, which takes
    RewardColumns and its options by keyword. components: float64[N, K], for kinds that look at them.
    Raises ConfigError for an unknown kind or option, ValueError for columns of unequal length, TrainingError for a
    reward that may not be (where asked for) or an advantage that is not finite.

    Example: advantages([0, 1, 1, 0], ["count"] * 4, [7, 7, 7, 7]).values
    """
    _check_names(kind, {"components": components} if isinstance(components, str) else options)
    columns = reward_columns(rewards, tasks, groups, components)
    result = _method(kind)(columns, **options)
    if result.values.shape != columns.rewards.shape or not np.isfinite(result.values).all():
        raise TrainingError(f"{kind} did not give {len(columns.rewards)} finite advantages, one for each reward")
    return result


def check_options(kind: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError for what `advantages` would refuse, before a run is built.

    That is an unknown kind, an option that it does not know and, for the kinds of ADVANTAGES, a value that it does
    not take.
    """
    _check_names(kind, options)
    if kind in ADVANTAGES:
        ADVANTAGES[kind](reward_columns([], [], [], None), **options)


def _check_names(kind: str, options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(_method(kind)).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise unknown_name(name, known, f"algorithm.advantage.options of {kind}")


def _method(kind: str) -> Method:
    method = resolve_name(kind, ADVANTAGES, "algorithm.advantage.kind")
    if not callable(method):
        raise ConfigError(f"algorithm.advantage.kind: {kind!r} is a {type(method).__name__}, not a function")
    return method
