"""EMA-GRPO: each reward less its group's mean, divided by a moving average of the task's standard deviation.

onethinker  (arXiv 2512.03043 and its code) averages mean and mean square of all the task's rewards
paper       (OpenVLThinkerV2, arXiv 2604.08539, eq. 3) averages the groups' standard deviations
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_vlrl.algorithms.blocks import sort_blocks
from megatron_vlrl.algorithms.columns import Floats, Ints, RewardColumns, require, require_eps, require_number
from megatron_vlrl.algorithms.groups import group_values, reward_groups
from megatron_vlrl.errors import ConfigError
from megatron_vlrl.types import AdvantageResult

LEAST_STD = 1e-3  # onethinker: of a task
GREATEST = 5.0  # onethinker: a group with an advantage beyond this uses its own standard deviation
STATE_KEYS = {"onethinker": ("mean", "mean_square"), "paper": ("std",)}

State = Mapping[str, Mapping[str, float]]


def ema_grpo(
    columns: RewardColumns,
    *,
    variant: str = "onethinker",
    decay: float = 0.99,
    eps: float = 1e-6,
    tie_tol: float = 1e-9,
    invalid_reward: str = "drop",
    state: State | None = None,
) -> AdvantageResult:
    """(R - group's mean) / (task's std + eps); 0 where all rewards of the group are equal; bit-equal in any order.

    state: the result's `state` of the step before; none at the first step. It has a task's averages by its name, and
    they move before they are used: decay * old + (1 - decay) * new; a task's first new values are taken as they are.
    variant: `onethinker` averages mean and mean square of all rewards that are not dropped, uniform groups included;
    std = max(sqrt(mean_square - mean^2), 1e-3), but a group in which any |A| would be over 5 uses its own. `paper`
    averages std itself: new is the mean std of the task's groups in the step, uniform ones left out.
    The std of a group divides by n. Raises ConfigError for a state of another form, as the other variant's is.
    """
    require("variant", variant, tuple(STATE_KEYS))
    require_number("decay", decay, lambda x: 0 <= x < 1, "a number from 0 to below 1")
    require_eps(eps)
    groups, result = reward_groups(columns, invalid_reward, tie_tol)
    centered, own = groups.centered(), groups.deviations(unbiased=False)
    tasks, task = np.unique(columns.tasks[groups.order[groups.starts]], return_inverse=True)  # of each group
    names = [columns.task_name(number) for number in tasks.tolist()]
    if variant == "onethinker":
        new = _means(groups.values, groups.rows(task), names, lambda x: {"mean": x, "mean_square": x**2})
    else:
        differing = ~groups.uniform(tie_tol)
        new = _means(own[differing], task[differing], names, lambda x: {"std": x})
    moved = _move(state or {}, new, decay, STATE_KEYS[variant])
    # A task that only had uniform groups so far may have no std; its advantages are 0 whatever it is.
    task_std = np.array([_std(moved[name]) if name in moved else 1.0 for name in names])[task]
    if variant == "onethinker":
        last = groups.starts + groups.sizes - 1
        largest = np.maximum(-centered[groups.starts], centered[last])
        task_std = np.where(largest / (task_std + eps) > GREATEST, own, task_std)
    values = centered / (groups.rows(task_std) + eps)
    return replace(group_values(groups, result, values), state=moved)


def _means(
    values: Floats, tasks: Ints, names: Sequence[str], moments: Callable[[Floats], Mapping[str, Floats]]
) -> dict[str, dict[str, float]]:
    """By name, the means of some moments of each task's values; tasks: int64[n], places in `names`."""
    blocks = sort_blocks(values, tasks, np.argsort(values))
    found = [names[number] for number in tasks[blocks.order[blocks.starts]].tolist()]
    columns = {key: (blocks.sums(m) / blocks.sizes).tolist() for key, m in moments(blocks.values).items()}
    return {name: {key: column[place] for key, column in columns.items()} for place, name in enumerate(found)}


def _move(state: State, new: State, decay: float, keys: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """The state after one more step; tasks that the step did not have stay as they are."""
    for name, averages in state.items():
        if set(averages) != set(keys) or not all(math.isfinite(value) for value in averages.values()):
            raise ConfigError(
                f"advantage option state: task {name!r} has {dict(averages)}, not finite numbers {' and '.join(keys)}; "
                "was it made by the other variant? Resume with that one"
            )
    moved = {name: dict(averages) for name, averages in state.items()}
    for name, now in new.items():
        old = moved.get(name)
        moved[name] = {key: decay * old[key] + (1 - decay) * now[key] for key in keys} if old else dict(now)
    return moved


def _std(averages: Mapping[str, float]) -> float:
    """The standard deviation that a task's averages say."""
    if "std" in averages:
        return averages["std"]
    return max(math.sqrt(max(averages["mean_square"] - averages["mean"] ** 2, 0.0)), LEAST_STD)
