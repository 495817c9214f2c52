"""A Config with schedules in, the Config of each step out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from megatron_vlrl.algorithms.schedules import SCHEDULES
from megatron_vlrl.config import checks
from megatron_vlrl.config.names import resolve_name, unknown_name
from megatron_vlrl.config.schema import Config
from megatron_vlrl.config.stepwise import with_values
from megatron_vlrl.errors import ConfigError


class Scheduled:
    """The settings of each step. They follow from the step's number alone, so a resumed run goes on with its own.

    Raises ConfigError for what no run could use: an unknown kind, wrong arguments, a key that no schedule can move,
    and settings of any step from 0 to train.steps - 1 that `checks.check` refuses.

    Example: Scheduled(config).at(40).algorithm.kl.coefficient
    """

    def __init__(self, config: Config) -> None:
        checks.check(config)
        self._config = config
        self._schedules = {key: _schedule(key, arguments) for key, arguments in config.schedules.items()}
        self.check(checks.check)

    def at(self, step: int) -> Config:
        """The settings of step `step`, counted from 0."""
        return with_values(self._config, self.values(step))

    def values(self, step: int) -> dict[str, float]:
        """What the schedules say of their keys, before whole numbers are rounded."""
        return {key: self._value(key, step) for key in self._schedules}

    def check(self, check: Callable[[Config], None]) -> None:
        """Raise ConfigError for the first step of the run whose settings `check` refuses."""
        before: Mapping[str, float] | None = None
        for step in range(self._config.train.steps):
            values = self.values(step)
            if values == before:
                continue
            before = values
            try:
                check(with_values(self._config, values))
            except ConfigError as error:
                said = ", ".join(f"{key}={value:g}" for key, value in values.items())
                raise ConfigError(f"step {step}, with {said} as scheduled: {error}" if said else str(error)) from error

    def _value(self, key: str, step: int) -> float:
        try:
            value = self._schedules[key](step, self._config.train.steps)
        except ConfigError as error:
            raise ConfigError(f"schedules.{key}: {error}") from error
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"schedules.{key} gives {value!r} at step {step}; it has to give a finite number")
        return value


def _schedule(key: str, arguments: Mapping[str, Any]) -> Callable[[int, int], float]:
    """The function that `kind` names, with its other arguments given."""
    kind = arguments["kind"]
    function = resolve_name(kind, SCHEDULES, f"schedules.{key}.kind")
    if not callable(function):
        raise ConfigError(f"schedules.{key}.kind: {kind!r} is a {type(function).__name__}, not a function")
    given = {name: value for name, value in arguments.items() if name != "kind"}
    known = {p.name: p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for name in given:
        if name not in known:
            raise unknown_name(name, known, f"schedules.{key} of kind {kind}")
    missing = [name for name, p in known.items() if p.default is p.empty and name not in given]
    if missing:
        raise ConfigError(f"schedules.{key} of kind {kind} needs {', '.join(missing)}")
    return partial(function, **given)
