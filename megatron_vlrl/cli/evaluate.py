"""Measure a model's accuracy on shards, by task.

--model and --data are short for model.path=... and evaluate.data=...
"""

from __future__ import annotations

import argparse

from megatron_vlrl.cli.settings import add_settings, on_ranks, read_settings
from megatron_vlrl.config.schema import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--model", metavar="FOLDER", help="Hugging Face folder")
    parser.add_argument("--data", metavar="FOLDER", help="folder of shards with a manifest")
    add_settings(parser, config_required=False)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; the exit code."""
    named = {"model.path": arguments.model, "evaluate.data": arguments.data}
    overrides = [*arguments.overrides, *(f"{key}={value}" for key, value in named.items() if value is not None)]
    config = read_settings(arguments.config, overrides, tuple(named))
    return on_ranks(config, arguments.argv, _evaluate)


def _evaluate(config: Config) -> str | None:
    from megatron_vlrl import loop

    return loop.evaluate_model(config)
