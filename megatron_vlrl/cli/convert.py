"""Turn a training checkpoint into a Hugging Face folder."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from megatron_vlrl.config.load import load
from megatron_vlrl.config.schema import ParallelConfig
from megatron_vlrl.errors import CheckpointError
from megatron_vlrl.runtime.launch import World


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--from", dest="checkpoint", type=Path, required=True, metavar="CHECKPOINT")
    parser.add_argument("--to-hf", dest="out", type=Path, required=True, metavar="FOLDER")


def run(arguments: argparse.Namespace) -> int:
    """Convert; the exit code."""
    _convert(arguments.checkpoint.resolve(), arguments.out)
    return 0


def _convert(checkpoint: Path, out: Path) -> None:
    """In one process, whatever the layout of the run; its config.yaml lies two folders above the checkpoint."""
    settings = checkpoint.parent.parent / "config.yaml"
    if not settings.is_file():
        raise CheckpointError(
            f"{settings} does not exist; --from takes a run's checkpoints/step-* folder, in its place"
        )
    config = replace(load(settings, []), parallel=ParallelConfig())

    from megatron_vlrl.backends import BackendOptions, build_backend
    from megatron_vlrl.checkpoint.export import export_model
    from megatron_vlrl.checkpoint.store import CheckpointStore
    from megatron_vlrl.models.qwen3_vl.render import Renderer
    from megatron_vlrl.rollout.sampling import sampling_for
    from megatron_vlrl.runtime.process import joined

    world = World(rank=0, local_rank=0, size=1, launcher="none")
    with joined(world, timeout_seconds=config.parallel.timeout_seconds, threads=config.run.threads):
        source = Path(config.model.path)
        sampling = sampling_for(config.rollout, Renderer(source, config.data.max_prompt_tokens), seed=config.run.seed)
        backend = build_backend(BackendOptions.of(config, sampling))
        CheckpointStore(checkpoint.parent, keep=1, world=backend.groups.world).find(checkpoint)
        backend.load(checkpoint)
        export_model(backend, out, source)
        backend.close()
