"""Turn a Hugging Face folder into a checkpoint, or a checkpoint into a Hugging Face folder.

A converted checkpoint holds weights only; a run takes them with run.resume=FOLDER, at any layout, and starts at step 0.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_vlrl.errors import CheckpointError, ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--from-hf", type=Path, metavar="FOLDER", help="Hugging Face folder of a Qwen3-VL")
    start.add_argument(
        "--from", dest="checkpoint", type=Path, metavar="CHECKPOINT", help="converted, or a run's checkpoints/step-*"
    )
    end = parser.add_mutually_exclusive_group(required=True)
    end.add_argument("--to", type=Path, metavar="FOLDER", help="the checkpoint to write; new or empty")
    end.add_argument("--to-hf", type=Path, metavar="FOLDER", help="the Hugging Face folder to write")
    parser.add_argument("--tensor", type=int, metavar="N", help="tensor ranks to cut --to for; default 1")
    parser.add_argument("--expert", type=int, metavar="N", help="expert ranks to cut --to for; default 1")
    parser.add_argument("--pipeline", type=int, metavar="N", help="pipeline ranks to cut --to for; default 1")


def run(arguments: argparse.Namespace) -> int:
    """Convert; the exit code."""
    if (arguments.from_hf is None) == (arguments.to_hf is None):
        raise ConfigError("convert goes --from-hf FOLDER --to FOLDER, or --from CHECKPOINT --to-hf FOLDER")
    degrees = {name: getattr(arguments, name) for name in ("tensor", "expert", "pipeline")}
    given = {name: degree for name, degree in degrees.items() if degree is not None}
    if arguments.from_hf is not None:
        _import(arguments.from_hf, arguments.to, **given)
    elif given:
        raise ConfigError(f"--{' and --'.join(given)} cut a checkpoint; a Hugging Face folder is whole: leave them out")
    else:
        _export(arguments.checkpoint.resolve(), arguments.to_hf)
    return 0


def _import(source: Path, out: Path, *, tensor: int = 1, expert: int = 1, pipeline: int = 1) -> None:
    from megatron_vlrl.checkpoint.convert import convert_from_hf
    from megatron_vlrl.parallel.dims import ParallelDims

    # Experts are shared by data ranks; the token axis is not the weights' concern, but experts ask for its split.
    dims = ParallelDims(tensor=tensor, pipeline=pipeline, data=expert, expert=expert, sequence=True)
    convert_from_hf(source, out, dims)


def _export(checkpoint: Path, out: Path) -> None:
    from megatron_vlrl.checkpoint.convert import SETTINGS_FOLDER, convert_to_hf

    own = (checkpoint / SETTINGS_FOLDER).is_dir()
    convert_to_hf(checkpoint, out, None if own else _source(checkpoint))


def _source(checkpoint: Path) -> Path:
    """The model folder of the run that a checkpoint is of; its config.yaml lies two folders above."""
    from megatron_vlrl.config.load import load

    settings = checkpoint.parent.parent / "config.yaml"
    if not settings.is_file():
        raise CheckpointError(
            f"{settings} does not exist; --from takes a converted checkpoint, or a run's checkpoints/step-* folder "
            "in its place"
        )
    return Path(load(settings, []).model.path)
