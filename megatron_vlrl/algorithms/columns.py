"""What a caller gives as rewards, tasks and groups in; one table of checked columns out, and checks of options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_vlrl.config.names import unknown_name
from megatron_vlrl.errors import ConfigError, TrainingError
from megatron_vlrl.types import AdvantageResult

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class RewardColumns:
    """The rewards of a step, N rollouts in any order.

    rewards: float64[N], NaN or infinite where a verifier failed. tasks, groups: int64[N]; a group is the rows of
    one task with one group id. components: float64[N, K] or None.
    """

    rewards: Floats
    tasks: Ints
    groups: Ints
    components: Floats | None = None


def reward_columns(
    rewards: ArrayLike, tasks: ArrayLike, groups: ArrayLike, components: ArrayLike | None
) -> RewardColumns:
    """Columns of one length and type; tasks and groups may be integers or strings. Raises ValueError for others."""
    reward = np.asarray(rewards, dtype=np.float64)
    if reward.ndim != 1:
        raise ValueError(f"rewards have shape {reward.shape}; give one number for each rollout")
    count = len(reward)
    table = None if components is None else np.asarray(components, dtype=np.float64)
    if table is not None and (table.ndim != 2 or len(table) != count):
        raise ValueError(f"components have shape {table.shape}; give one row for each of the {count} rewards")
    return RewardColumns(reward, _ids(tasks, "tasks", count), _ids(groups, "groups", count), table)


def _ids(ids: ArrayLike, name: str, count: int) -> Ints:
    column = np.asarray(ids)
    if column.shape != (count,):
        raise ValueError(f"{name} have shape {column.shape}, but there are {count} rewards; give one for each")
    if count == 0 or column.dtype.kind in "iu":
        return column.astype(np.int64)
    if column.dtype.kind not in "US":
        raise ValueError(f"{name} are of type {column.dtype}; give integers or strings")
    return np.unique(column, return_inverse=True)[1].astype(np.int64)


def settle_invalid(columns: RewardColumns, rule: str) -> tuple[RewardColumns, Bools]:
    """(columns, dropped bool[N]): what to do where a reward is NaN or infinite, that is, where its verifier failed.

    rule: `drop` leaves them out of the ranking, `zero` counts them as 0, `error` raises TrainingError.
    """
    require("invalid_reward", rule, ("drop", "zero", "error"))
    rewards = columns.rewards
    invalid = ~np.isfinite(rewards)
    if rule == "error" and invalid.any():
        first = int(np.argmax(invalid))
        raise TrainingError(
            f"{int(invalid.sum())} of {len(rewards)} rewards are not finite (first: {rewards[first]} in row {first}); "
            "mend the verifier, or set invalid_reward to drop"
        )
    if rule == "zero":
        return replace(columns, rewards=np.where(invalid, 0.0, rewards)), np.zeros_like(invalid)
    return columns, invalid


def blank_result(dropped: Bools) -> AdvantageResult:
    """0 for each rollout and no other flag, to be filled in."""
    return AdvantageResult(
        values=np.zeros(len(dropped)),
        uniform=np.zeros_like(dropped),
        tied=np.zeros_like(dropped),
        dropped=dropped,
    )


def require(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError, with the nearest match, where `value` is not one that `option` takes."""
    if value not in allowed:
        raise unknown_name(str(value), allowed, f"advantage option {option}")


def require_number(option: str, value: Any, holds: Callable[[Any], bool], wanted: str) -> None:
    """Raise ConfigError where `value` is not a number for which `holds`; `wanted` says which ones are."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
        raise ConfigError(f"advantage option {option}: {value!r} is not {wanted}")
