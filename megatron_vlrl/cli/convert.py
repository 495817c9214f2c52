"""Turn a training checkpoint into a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--from", dest="checkpoint", type=Path, required=True, metavar="CHECKPOINT")
    parser.add_argument("--to-hf", dest="out", type=Path, required=True, metavar="FOLDER")


def run(arguments: argparse.Namespace) -> int:
    """Convert; the exit code."""
    from megatron_vlrl import loop

    loop.convert(arguments.checkpoint, arguments.out)
    return 0
