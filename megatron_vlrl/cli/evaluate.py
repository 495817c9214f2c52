"""Measure a model's accuracy on shards, by task.

--model and --data are short for model.path=... and evaluate.data=...
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from megatron_vlrl.cli.settings import add_settings, on_ranks, read_settings
from megatron_vlrl.config.schema import Config
from megatron_vlrl.runtime.launch import world_from_env


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


def _evaluate(config: Config) -> str:
    from megatron_vlrl.models.qwen3_vl.render import Renderer
    from megatron_vlrl.parallel.collectives import world_group
    from megatron_vlrl.parallel.groups import ProcessGroups
    from megatron_vlrl.rollout.held_out import HeldOut
    from megatron_vlrl.runtime.process import joined

    world = world_from_env(os.environ)
    with joined(world, timeout_seconds=config.parallel.timeout_seconds, threads=config.run.threads):
        renderer = Renderer(Path(config.model.path), config.data.max_prompt_tokens)
        result = HeldOut(config, renderer, ProcessGroups.replicas(world_group()))()
        return _table(result.scores(), result.mean)


def _table(scores: Mapping[str, Mapping[str, float]], mean: float) -> str:
    """One aligned line a task, and the mean over tasks."""
    lines = [f"{'task':<12} {'accuracy':>17} {'items':>6}"]
    for name, score in scores.items():
        lines.append(f"{name:<12} {score['accuracy']:>9.3f} ± {score['half_width']:.3f} {score['count']:>6.0f}")
    items = sum(score["count"] for score in scores.values())
    return "\n".join([*lines, f"{'mean':<12} {mean:>9.3f} {'':>7} {items:>6.0f}"])
