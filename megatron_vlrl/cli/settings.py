"""What `train` and `evaluate` share: the configuration from arguments, and the ranks it runs on."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_vlrl.config.checks import check, require
from megatron_vlrl.config.load import load
from megatron_vlrl.config.schema import Config
from megatron_vlrl.runtime.failure import EXIT_UNREAD
from megatron_vlrl.runtime.launch import degrees, needs_local_launch, thread_environment, world_from_env
from megatron_vlrl.runtime.logs import log_file
from megatron_vlrl.runtime.ranks import adopt_rank, run_ranks


def add_settings(parser: argparse.ArgumentParser, *, config_required: bool) -> None:
    """`--config FILE` and `section.key=value ...`."""
    parser.add_argument("--config", type=Path, required=config_required, metavar="FILE", help="YAML of settings")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings laid over the file's")


def read_settings(path: Path | None, overrides: Sequence[str], wanted: Sequence[str]) -> Config:
    """The checked configuration; ConfigError also where a setting of `wanted` is empty."""
    config = load(path, overrides)
    check(config)
    require(config, *wanted)
    return config


def on_ranks(config: Config, argv: Sequence[str], body: Callable[[Config], str | None]) -> int:
    """Run `body` as one rank of the job, or start all ranks on this machine, with `argv` again, if nobody has.

    Rank 0 prints what `body` returns. The exit code.
    """
    world = world_from_env(os.environ)
    logs = Path(config.run.folder) / "logs"
    if not needs_local_launch(config.parallel, world):
        os.environ.update(thread_environment(config.run.threads))
        adopt_rank(world, logs)
        text = body(config)
        if text and world.rank == 0:
            print(text)
        return 0
    command = [sys.executable, "-m", "megatron_vlrl", *argv]
    failed = run_ranks(command, size=degrees(config.parallel), threads=config.run.threads)
    if failed is None:
        return 0
    if failed.unread:
        return EXIT_UNREAD
    log = log_file(logs, failed.rank)
    print(f"error: rank {failed.rank} {failed.reason}", file=sys.stderr)
    if not failed.expected:
        print(f"{failed.trace}the other ranks were stopped; this rank's log: {log}", file=sys.stderr)
    return 2 if failed.expected else 1
