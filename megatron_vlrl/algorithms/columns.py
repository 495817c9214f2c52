"""What a caller gives as rewards, tasks and groups in; one table of checked columns out, and checks of options."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_vlrl.config.names import unknown_name
from megatron_vlrl.errors import ConfigError, TrainingError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class RewardColumns:
    """The rewards of a step, N rollouts in any order.

    rewards: float64[N], NaN or infinite where a verifier failed. tasks, groups: int64[N]; a group is the rows of
    one task with one group id. components: float64[N, K] or None; NaN or infinite where a rollout has no such
    component. weights: float64[N, K] of the components, or None: all 1. lengths: int64[N], response tokens, or None.
    task_names: the name of each task's number, or None where tasks were given as integers.
    """

    rewards: Floats
    tasks: Ints
    groups: Ints
    components: Floats | None = None
    weights: Floats | None = None
    lengths: Ints | None = None
    task_names: tuple[str, ...] | None = None

    def task_name(self, task: int) -> str:
        """What the state of a kind calls a task: its name, or its number as text."""
        return str(task) if self.task_names is None else self.task_names[task]


def reward_columns(
    rewards: ArrayLike,
    tasks: ArrayLike,
    groups: ArrayLike,
    components: ArrayLike | None = None,
    component_weights: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
) -> RewardColumns:
    """Columns of one length and type; tasks and groups may be integers or strings. Raises ValueError for others."""
    reward = np.asarray(rewards, dtype=np.float64)
    if reward.ndim != 1:
        raise ValueError(f"rewards have shape {reward.shape}; give one number for each rollout")
    count = len(reward)
    task, names = _ids(tasks, "tasks", count)
    group, _ = _ids(groups, "groups", count)
    table = _components(components, count)
    return RewardColumns(
        rewards=reward,
        tasks=task,
        groups=group,
        components=table,
        weights=_weights(component_weights, table),
        lengths=_lengths(lengths, count),
        task_names=names,
    )


def _ids(ids: ArrayLike, name: str, count: int) -> tuple[Ints, tuple[str, ...] | None]:
    column = np.asarray(ids)
    if column.shape != (count,):
        raise ValueError(f"{name} have shape {column.shape}, but there are {count} rewards; give one for each")
    if count == 0 or column.dtype.kind in "iu":
        return column.astype(np.int64, copy=False), None
    if column.dtype.kind not in "US":
        raise ValueError(f"{name} are of type {column.dtype}; give integers or strings")
    names, numbers = np.unique(column.astype(np.str_, copy=False), return_inverse=True)
    return numbers.astype(np.int64, copy=False), tuple(names.tolist())


def _components(components: ArrayLike | None, count: int) -> Floats | None:
    table = None if components is None else np.asarray(components, dtype=np.float64)
    if table is not None and (table.ndim != 2 or len(table) != count):
        raise ValueError(f"components have shape {table.shape}; give one row for each of the {count} rewards")
    return table


def _weights(weights: ArrayLike | None, components: Floats | None) -> Floats | None:
    if weights is None:
        return None
    if components is None:
        raise ValueError("component_weights are given without components; give both or neither")
    table = np.asarray(weights, dtype=np.float64)
    if table.shape not in (components.shape, components.shape[1:]):
        raise ValueError(
            f"component_weights have shape {table.shape}, components {components.shape}; give one for each component, "
            "or one for each component of each rollout"
        )
    if not np.isfinite(table).all():
        raise ValueError("component_weights are not all finite; the weight of a component that is not there is 0")
    return np.broadcast_to(table, components.shape)


def _lengths(lengths: ArrayLike | None, count: int) -> Ints | None:
    if lengths is None:
        return None
    column = np.asarray(lengths)
    if column.shape != (count,) or (count and (column.dtype.kind not in "iu" or column.min() < 1)):
        raise ValueError(f"lengths are not {count} whole numbers of 1 or more; give the tokens of each response")
    return column.astype(np.int64, copy=False)


def settle_invalid(columns: RewardColumns, rule: str) -> tuple[RewardColumns, Bools]:
    """(columns, dropped bool[N]): what to do where a reward is NaN or infinite, that is, where its verifier failed.

    rule: `drop` leaves them out of the ranking, `zero` counts them and each of their components as 0, `error` raises
    TrainingError.
    """
    require("invalid_reward", rule, ("drop", "zero", "error"))
    rewards = columns.rewards
    invalid = ~np.isfinite(rewards)
    if rule == "drop" or not invalid.any():
        return columns, invalid
    if rule == "error":
        first = int(np.argmax(invalid))
        raise TrainingError(
            f"{int(invalid.sum())} of {len(rewards)} rewards are not finite (first: {rewards[first]} in row {first}); "
            "mend the verifier, or set invalid_reward to drop"
        )
    table = columns.components
    zeroed = None if table is None else np.where(invalid[:, None], 0.0, table)
    return replace(columns, rewards=np.where(invalid, 0.0, rewards), components=zeroed), np.zeros_like(invalid)


def by_component(columns: RewardColumns, dropped: Bools) -> list[tuple[RewardColumns, Floats]]:
    """The columns once for each of K components, with it for the rewards, and its weights float64[N].

    The reward is NaN where the rollout was dropped or has no such component; one of weight 0 counts as not there.
    Raises ValueError where the columns have no components.
    """
    if columns.components is None:
        raise ValueError("there are no components to look at one by one; give them as `components`, float64[N, K]")
    weights = np.ones_like(columns.components) if columns.weights is None else columns.weights
    absent = dropped[:, None] | (weights == 0) | ~np.isfinite(columns.components)
    table = np.where(absent, np.nan, columns.components)
    return [
        (replace(columns, rewards=np.ascontiguousarray(values)), weight)
        for values, weight in zip(table.T, weights.T, strict=True)
    ]


def sample_weights(columns: RewardColumns, *, token_weighted: bool) -> Floats:
    """What each rollout counts for in a mean over the batch, float64[N]: 1, or its tokens.

    Raises ValueError where tokens are asked for and the columns have no lengths.
    """
    require_flag("token_weighted", token_weighted)
    if not token_weighted:
        return np.ones(len(columns.rewards))
    if columns.lengths is None:
        raise ValueError("token_weighted needs the tokens of each response; give them as `lengths`, int64[N]")
    return columns.lengths.astype(np.float64)


def require(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError, with the nearest match, where `value` is not one that `option` takes."""
    if value not in allowed:
        raise unknown_name(str(value), allowed, f"advantage option {option}")


def require_number(option: str, value: Any, holds: Callable[[Any], bool], wanted: str) -> None:
    """Raise ConfigError where `value` is not a number for which `holds`; `wanted` says which ones are."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
        raise ConfigError(f"advantage option {option}: {value!r} is not {wanted}")


def require_eps(value: Any) -> None:
    """Raise ConfigError where `value` is not a finite number above 0."""
    require_number("eps", value, lambda x: 0 < x < math.inf, "a finite number above 0")


def require_tolerance(value: Any) -> None:
    """Raise ConfigError where `value` is not a finite number of 0 or more."""
    require_number("tie_tol", value, lambda x: 0 <= x < math.inf, "a finite number, 0 or more")


def require_flag(option: str, value: Any) -> None:
    """Raise ConfigError where `value` is not a bool."""
    if not isinstance(value, bool):
        raise ConfigError(f"advantage option {option}: {value!r} is not true or false")
