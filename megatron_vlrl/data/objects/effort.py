"""How long one call on a remote store may take: pauses that grow, and the moment to give up."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass

from megatron_vlrl.errors import DataError

_log = logging.getLogger(__name__)
_jitter = random.Random()  # its own: the run's random state is part of a checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """Seconds, but for `slowest`.

    connect: to open a connection. silence: between two pieces of an answer. budget: for a whole call, retries and
    all, to which one second is added for every `slowest` bytes it asks for. first_pause, longest_pause: before an
    attempt is repeated.
    """

    connect: float = 5.0
    silence: float = 10.0
    budget: float = 90.0  # below the 120 s that other ranks wait for this one (parallel.timeout_seconds)
    slowest: float = 1e6
    first_pause: float = 0.1
    longest_pause: float = 10.0
    quiet: float = 5.0  # a call that has tried for longer says so in the log


class Effort:
    """One call's attempts at `what`."""

    def __init__(self, what: str, patience: Patience, length: int = 0) -> None:
        self._what, self._patience = what, patience
        self._started = time.monotonic()
        self._seconds = patience.budget + length / patience.slowest
        self._failures = self._streak = 0
        self._told = False

    def progress(self) -> None:
        """Bytes have come: the next pause is short again."""
        self._streak = 0

    def in_time(self) -> bool:
        """Whether time is left."""
        return time.monotonic() - self._started < self._seconds

    def failed(self, problem: str) -> None:
        """Sleep before the next attempt; raise DataError where the budget would not outlast the pause."""
        self._failures += 1
        spent = time.monotonic() - self._started
        pause = pause_before(self._streak, self._patience)
        self._streak += 1
        if spent + pause >= self._seconds:
            raise DataError(
                f"{self._what}: gave up after {spent:.0f} s and {self._failures} attempts, the last: {problem}; "
                "nothing was lost: mend the store or the network, then resume the run"
            )
        if spent > self._patience.quiet and not self._told:
            self._told = True
            _log.warning(
                "%s: %d attempts failed in %.0f s, the last: %s; trying until %.0f s",
                self._what,
                self._failures,
                spent,
                problem,
                self._seconds,
            )
        time.sleep(pause)


def pause_before(streak: int, patience: Patience) -> float:
    """Seconds before the attempt after `streak` + 1 failures in a row: doubled each time, and half of it random."""
    ceiling = min(patience.longest_pause, patience.first_pause * 2 ** min(streak, 30))
    return ceiling * _jitter.uniform(0.5, 1.0)
