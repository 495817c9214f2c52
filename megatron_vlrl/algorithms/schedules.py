"""The step's number in, the value of a scheduled setting out: no state, so a resumed run needs none.

A schedule is `(step, total, *, its own arguments) -> value`: step counts from 0, total is the run's number of steps.
Where it takes `steps`, that is the step at which it ends and stays; 0 is the run's end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from megatron_vlrl.config.names import unknown_name
from megatron_vlrl.errors import ConfigError

# (share of the run done in [0, 1], what is left at its end) -> factor
DECAYS: dict[str, Callable[[float, float], float]] = {
    "constant": lambda done, final: 1.0,
    "linear": lambda done, final: 1.0 - (1.0 - final) * done,
    "cosine": lambda done, final: final + (1.0 - final) * (1.0 + math.cos(math.pi * done)) / 2.0,
}


def learning_rate(step: int, *, base: float, steps: int, warmup: int, decay: str, final_ratio: float) -> float:
    """The rate of step `step`, counted from 0: base * warm-up * decay.

    warmup: steps over which the first factor rises, (step + 1) / warmup. decay: a name in DECAYS; the second factor
    goes from 1 at step 0 to `final_ratio` at `steps`, and stays there. Raises ConfigError for an unknown decay.

    Example: learning_rate(0, base=3e-4, steps=100, warmup=5, decay="linear", final_ratio=0.1) == 6e-5
    """
    if decay not in DECAYS:
        raise unknown_name(decay, DECAYS, "optimizer.decay")
    if steps < 1:
        raise ConfigError(f"train.steps is {steps}; a schedule needs at least one step")
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return base * rise * DECAYS[decay](min(1.0, step / steps), final_ratio)


def constant(step: int, total: int, *, value: float) -> float:
    """`value` at every step."""
    return _number("value", value)


def linear(step: int, total: int, *, start: float, end: float, steps: int = 0) -> float:
    """From `start` at step 0 to `end` at `steps`, in a line."""
    return _mix(_number("start", start), _number("end", end), _done(step, steps, total))


def cosine(step: int, total: int, *, start: float, end: float, steps: int = 0) -> float:
    """From `start` at step 0 to `end` at `steps`, in half a cosine: level at both."""
    share = 1.0 - DECAYS["cosine"](_done(step, steps, total), 0.0)
    return _mix(_number("start", start), _number("end", end), share)


def piecewise(step: int, total: int, *, points: Sequence[tuple[float, float]]) -> float:
    """In lines from point to point, each [step, value]; level before the first and after the last.

    Example: piecewise(25, 100, points=[[0, 1.0], [50, 0.8]]) == 0.9
    """
    known = _points(points)
    for (begin, start), (last, end) in pairwise(known):
        if step < last:
            return _mix(start, end, max(0.0, (step - begin) / (last - begin)))
    return known[-1][1]


def grpo_d(
    step: int, total: int, *, min: float, max: float, turn: float = 0.3, shape: str = "paper", steps: int = 0
) -> float:
    """GRPO-D's weight of the KL term (OThink-MR1, equation 3), in two lines that meet at `turn` of the `steps`.

    paper: from the middle of `min` and `max` down to `min`, then up to `max`, as the formula says. rising: from `min`
    up to the middle, then to `max`, as the prose says; where it passes the middle is ours.
    """
    low, high, bend = _number("min", min), _number("max", max), _number("turn", turn)
    if low > high:
        raise ConfigError(f"min is {low} and max is {high}; use a max that is not below min")
    if not 0 < bend < 1:
        raise ConfigError(f"turn is {bend}; use a share of the steps between 0 and 1")
    if shape not in ("paper", "rising"):
        raise unknown_name(shape, ("paper", "rising"), "shape")
    middle = (low + high) / 2.0
    start, lowest = (middle, low) if shape == "paper" else (low, middle)
    done = _done(step, steps, total)
    return _mix(start, lowest, done / bend) if done <= bend else _mix(lowest, high, (done - bend) / (1.0 - bend))


SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "piecewise": piecewise,
    "grpo_d": grpo_d,
}


def _done(step: int, steps: int, total: int) -> float:
    """Share of the schedule that is done before `step`, in [0, 1]."""
    if type(steps) is not int or steps < 0:
        raise ConfigError(f"steps is {steps!r}; use a whole number of steps, or 0 for train.steps")
    return min(1.0, step / (steps or total))


def _mix(start: float, end: float, share: float) -> float:
    """`start` at share 0, `end` at 1, and never outside of the two, rounding included."""
    low, high = sorted((start, end))
    return min(high, max(low, start * (1.0 - share) + end * share))


def _points(points: object) -> list[tuple[float, float]]:
    if not isinstance(points, list | tuple) or not points:
        raise ConfigError(f"points is {points!r}; write [[step, value], ...]")
    known = []
    for point in points:
        if not isinstance(point, list | tuple) or len(point) != 2:
            raise ConfigError(f"points has {point!r}; write each as [step, value]")
        known.append((_number("points: a step", point[0]), _number("points: a value", point[1])))
    steps = [step for step, _ in known]
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise ConfigError(f"points has the steps {steps}; write them in ascending order, each once")
    return known


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name} is {value!r}; use a finite number")
    return value
