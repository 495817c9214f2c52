"""Rewards -> advantages, shaping and schedules: pure functions, torch-free but for `losses`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_vlrl.algorithms.columns import RewardColumns, reward_columns
from megatron_vlrl.algorithms.dr_grpo import dr_grpo
from megatron_vlrl.algorithms.ema_grpo import ema_grpo
from megatron_vlrl.algorithms.g2rpo import g2rpo
from megatron_vlrl.algorithms.gdpo import gdpo
from megatron_vlrl.algorithms.grpo import grpo
from megatron_vlrl.algorithms.ones import ones
from megatron_vlrl.algorithms.reinforce_plus_plus import reinforce_plus_plus
from megatron_vlrl.algorithms.rloo import rloo
from megatron_vlrl.config.names import resolve_name, unknown_name
from megatron_vlrl.errors import ConfigError, TrainingError
from megatron_vlrl.types import AdvantageResult

__all__ = ["ADVANTAGES", "AdvantageResult", "RewardColumns", "advantages", "check_options", "keeps_state"]

# (columns, *, its own options) -> one advantage for each row, in their order
Method = Callable[..., AdvantageResult]

ADVANTAGES: dict[str, Method] = {
    "g2rpo": g2rpo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "ema_grpo": ema_grpo,
    "gdpo": gdpo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "ones": ones,
}


def advantages(
    rewards: ArrayLike,
    tasks: ArrayLike,
    groups: ArrayLike,
    kind: str = "g2rpo",
    components: ArrayLike | None = None,
    component_weights: ArrayLike | None = None,
    *,
    lengths: ArrayLike | None = None,
    options: Mapping[str, Any] | None = None,
    **named: Any,
) -> AdvantageResult:
    """One advantage for each rollout, in the order given; the same bits for any order of the rows.

    rewards: N numbers; NaN or infinite where a verifier failed. tasks, groups: N integers or strings; a group is the
    rows of one task with one group id. kind: a name in ADVANTAGES, or a user's `package.module:function`, which takes
    RewardColumns and its options by keyword. For the kinds that look at them: components: float64[N, K], not finite
    where a rollout has none; component_weights: float64[K] or [N, K], 1 if not given; lengths: N response tokens.

    options: the kind's options, as in `algorithm.advantage.options`. Any but those whose name is taken here, as that of
    g2rpo's option `components` is, can be given by name instead, like the `state` of a kind that keeps one.

    Raises ConfigError for an unknown kind or option, ValueError for columns of unequal length or missing, TrainingError
    for a reward that may not be (where asked for) or an advantage that is not finite.

    Example: advantages([0, 1, 1, 0], ["count"] * 4, [7, 7, 7, 7]).values
    """
    if isinstance(components, str):
        raise ConfigError(
            f"components={components!r} is a value of the option `components`; give that as "
            f"options={{'components': {components!r}}}, and the table float64[N, K] as `components`"
        )
    chosen = {**(options or {}), **named}
    _check_names(kind, chosen)
    columns = reward_columns(rewards, tasks, groups, components, component_weights, lengths)
    result = _method(kind)(columns, **chosen)
    if result.values.shape != columns.rewards.shape or not np.isfinite(result.values).all():
        raise TrainingError(f"{kind} did not give {len(columns.rewards)} finite advantages, one for each reward")
    return result


def keeps_state(kind: str) -> bool:
    """Whether a kind takes the option `state`: its result's `state` of the step before."""
    return "state" in _option_names(_method(kind))


def check_options(kind: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError for what `advantages` would refuse, before a run is built.

    That is an unknown kind, an option that it does not know and, for the kinds of ADVANTAGES, a value that it does
    not take; and a `state`, which the run keeps.
    """
    _check_names(kind, options)
    if "state" in options:
        raise ConfigError("algorithm.advantage.options: `state` is kept by the run; leave it out")
    if kind in ADVANTAGES:
        ADVANTAGES[kind](reward_columns([], [], [], np.zeros((0, 0)), lengths=[]), **options)


def _check_names(kind: str, options: Mapping[str, Any]) -> None:
    known = _option_names(_method(kind))
    for name in options:
        if name not in known:
            raise unknown_name(name, known, f"algorithm.advantage.options of {kind}")


@cache
def _option_names(method: Method) -> tuple[str, ...]:
    parameters = inspect.signature(method).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def _method(kind: str) -> Method:
    method = resolve_name(kind, ADVANTAGES, "algorithm.advantage.kind")
    if not callable(method):
        raise ConfigError(f"algorithm.advantage.kind: {kind!r} is a {type(method).__name__}, not a function")
    return method
