"""Train a model by reinforcement learning.

Starts as many processes on this machine as parallel.tensor x parallel.pipeline x parallel.data asks for, unless
torchrun or srun has started them already.
"""

from __future__ import annotations

import argparse

from megatron_vlrl.cli.settings import add_settings, on_ranks, read_settings
from megatron_vlrl.config.schema import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_settings(parser, config_required=True)


def run(arguments: argparse.Namespace) -> int:
    """Train; the exit code."""
    config = read_settings(arguments.config, arguments.overrides, ("model.path", "data.train"))
    return on_ranks(config, arguments.argv, _train)


def _train(config: Config) -> str | None:
    from megatron_vlrl.loop import train

    return train(config)
