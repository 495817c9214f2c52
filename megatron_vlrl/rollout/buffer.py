"""Groups between their rollouts and their training: what one step has too many, the next one takes first.

Every data rank holds the groups that it wrote; which positions wait is known to all of them alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from megatron_vlrl.algorithms.filtering import filter_groups
from megatron_vlrl.config.schema import FilterConfig
from megatron_vlrl.types import RewardTable, ScoredGroup


class GroupBuffer:
    """Groups that wait to be trained, the oldest positions first."""

    def __init__(self) -> None:
        self._own: dict[int, ScoredGroup] = {}
        self._waiting: list[int] = []

    def __len__(self) -> int:
        """Groups that wait, over all data ranks."""
        return len(self._waiting)

    @property
    def own(self) -> tuple[ScoredGroup, ...]:
        """Those of this rank, by position."""
        return tuple(self._own[position] for position in sorted(self._own))

    def add(self, groups: Iterable[ScoredGroup], kept: Sequence[int]) -> None:
        """Let the groups at `kept` wait: positions over all data ranks, of which `groups` are this rank's."""
        self._waiting = sorted({*self._waiting, *kept})
        waiting = set(self._waiting)
        self._own |= {one.position: one for one in groups if one.position in waiting}

    def take(self, count: int) -> list[ScoredGroup]:
        """This rank's part of the first `count` groups, by position; fewer if fewer wait."""
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return [self._own.pop(position) for position in taken if position in self._own]


class Intake:
    """One step's intake of groups: how many prompts to draw next, which groups wait, and what became of the others.

    The first round draws what the step still misses. Where dynamic filtering then leaves too few, each further round
    draws a whole step's prompts: what is too many waits for the next step, so nothing that was written is lost.
    """

    def __init__(self, buffer: GroupBuffer, config: FilterConfig, wanted: int) -> None:
        self.tables: list[RewardTable] = []
        self._buffer, self._config, self._wanted = buffer, config, wanted
        self._carried = len(buffer)
        self._counts = dict.fromkeys(("drawn", "kept", "right", "wrong", "neither"), 0)

    def missing(self) -> int:
        """Prompts to draw now, over all data ranks; 0: enough groups wait, or the rounds are spent."""
        if not self.tables:
            return max(0, self._wanted - len(self._buffer))
        refills = 0 if self._config.rule == "off" else self._config.refill_rounds
        spent = len(self.tables) > refills
        return 0 if spent or len(self._buffer) >= self._wanted else self._wanted

    def add(self, scored: Sequence[ScoredGroup], table: RewardTable) -> None:
        """Take in a round's groups: `scored` are this rank's, `table` has the rewards of all ranks'."""
        filtered = filter_groups(table.component("accuracy"), table.position, self._config.rule)
        self._buffer.add(scored, filtered.kept.tolist())
        self.tables.append(table)
        self._counts["drawn"] += len(np.unique(table.position))
        for name in ("kept", "right", "wrong", "neither"):
            self._counts[name] += len(getattr(filtered, name))

    def scalars(self) -> dict[str, float]:
        """For the step's report, in groups; nothing where groups are not filtered.

        carried: those that had waited since the step before. short: how many the step misses.
        """
        if self._config.rule == "off":
            return {}
        short = max(0, self._wanted - self._carried - self._counts["kept"])
        extra = {"carried": self._carried, "rounds": len(self.tables), "short": short}
        return {f"filter/{name}": float(value) for name, value in (self._counts | extra).items()}
