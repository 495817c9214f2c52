"""What ended the ranks of a job in, the one that failed first and why out.

A rank that raises writes its error file in the form that torch's launchers read (`record`), so that torchrun, too,
shows the message. When one rank dies the others fail for lack of it: their errors are consequences, not causes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
EXIT_UNREAD = 141  # a rank whose output nobody reads any more ended without a message: 128 + SIGPIPE

# What gloo, NCCL and torch's store say in a process whose peer has gone.
_PEER_GONE = re.compile(r"gloo/transport|Connection (closed|reset) by peer|Dist(Network|Store|Backend)Error|NCCL error")
_STOPPED_BY_LAUNCHER = (signal.SIGTERM, signal.SIGINT)
_LATE_SECONDS = 20  # a kill so long after the first failure is the launcher's own, of a rank that would not stop


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How one rank ended badly. exit_code: -N for signal N. seen: when the launcher saw it, seconds since 1970.

    error: what the rank wrote of its exception, or None.
    """

    exit_code: int
    seen: float
    error: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFailure:
    """The first cause. expected: the reason says all that a user needs; else the trace is worth reading. unread: the
    rank ended because nobody reads its output, and has nothing to say."""

    rank: int
    reason: str
    trace: str
    expected: bool
    unread: bool = False


def record(error: BaseException, *, expected: bool) -> bool:
    """Log the error, and leave it for the launcher that started this process; False if none asked for it."""
    logging.getLogger(__name__).info("this rank failed", exc_info=error)  # the screen is the launcher's to write on
    path = os.environ.get(ERROR_FILE)
    if not path:
        return False
    summary = str(error) if expected else f"{type(error).__name__}: {error}"
    extra = {
        "py_callstack": "".join(traceback.format_exception(error)),
        "timestamp": str(int(time.time())),
        "time": time.time(),
        "expected": expected,
    }
    # Whole or not at all: torch's launcher trips over half a file, and may stop this process while it writes.
    part = Path(path + ".part")
    part.write_text(json.dumps({"message": {"message": summary, "extraInfo": extra}}), encoding="utf-8")
    part.replace(path)
    return True


def read_error(path: str) -> Mapping[str, Any] | None:
    """What `record` wrote to a rank's error file, or None if it died before it could."""
    try:
        message = json.loads(Path(path).read_text(encoding="utf-8"))["message"]
    except (OSError, ValueError):
        return None
    return {"summary": message["message"], **message["extraInfo"]}


def first_cause(endings: Mapping[int, Ending]) -> RankFailure:
    """The failure that the other ranks' failures follow from. endings: by rank, at least one."""
    first_seen = min(ending.seen for ending in endings.values())

    def order(rank: int) -> tuple[int, float, int]:
        ending = endings[rank]
        when = float(ending.error["time"]) if ending.error else ending.seen
        return _distance_from_cause(ending, first_seen), when, rank

    rank = min(endings, key=order)
    ending = endings[rank]
    if ending.error:
        reason, trace, expected = ending.error["summary"], ending.error["py_callstack"], bool(ending.error["expected"])
        return RankFailure(rank=rank, reason=f"failed: {reason}", trace=trace, expected=expected)
    code = ending.exit_code
    return RankFailure(rank=rank, reason=_silent_end(code), trace="", expected=False, unread=code == EXIT_UNREAD)


def _distance_from_cause(ending: Ending, first_seen: float) -> int:
    if ending.error:
        return 3 if _PEER_GONE.search(ending.error["py_callstack"]) else 1
    if ending.exit_code >= 0 or -ending.exit_code == signal.SIGABRT:
        return 2  # libraries abort when a peer leaves
    late = ending.seen - first_seen > _LATE_SECONDS
    return 4 if late or -ending.exit_code in _STOPPED_BY_LAUNCHER else 0


def _silent_end(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code} and no message"
    name = signal.Signals(-exit_code).name
    hint = " (the system does this to a process when memory runs out)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"
