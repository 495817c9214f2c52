"""A folder and a rank in, that rank's log file there: `rank-0.log`, `rank-1.log` ..."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path


def log_file(folder: Path, rank: int) -> Path:
    """Where a rank's log lies."""
    return folder / f"rank-{rank}.log"


def start_logging(folder: Path, rank: int, *, redirect: bool) -> None:
    """Append this process's log records to its file; rank 0 also shows warnings on its stderr.

    redirect: also send all that the process writes to stdout and stderr into the file, C++ libraries included.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = log_file(folder, rank)
    if redirect:
        sys.stdout.flush()
        sys.stderr.flush()
        with path.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    to_file = logging.FileHandler(path)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(to_file)
    if not redirect and rank == 0:
        to_screen = logging.StreamHandler()
        to_screen.setLevel(logging.WARNING)
        to_screen.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        root.addHandler(to_screen)
