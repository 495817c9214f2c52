"""The step's number in, the value of a scheduled setting out: no state, so a resumed run needs none."""

from __future__ import annotations

import math
from collections.abc import Callable

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
