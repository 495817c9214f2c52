"""Make shards from a JSONL file and a folder of images, or verify shards."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_vlrl.data.manifest import Manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    prepare = actions.add_parser("prepare", help="JSONL and images to webdataset shards with a manifest")
    prepare.add_argument(
        "--jsonl", type=Path, required=True, metavar="FILE", help="lines of key, task, prompt, images, answer, meta"
    )
    prepare.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="where the images' paths start")
    prepare.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the shards; new or empty")
    prepare.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="default 1000")
    verify = actions.add_parser("verify", help="hash every file again and compare with the manifest")
    verify.add_argument("folder", metavar="FOLDER", help="or s3://BUCKET/PREFIX")


def run(arguments: argparse.Namespace) -> int:
    """Prepare or verify, and print what the folder holds; the exit code."""
    from megatron_vlrl.data.manifest import verify
    from megatron_vlrl.data.objects import open_store
    from megatron_vlrl.data.prepare import prepare

    if arguments.action == "verify":
        print(_summary(arguments.folder, verify(open_store(arguments.folder))))
        return 0
    manifest = prepare(arguments.jsonl, arguments.images, arguments.out, arguments.samples_per_shard, check=_check_gold)
    print(_summary(arguments.out, manifest))
    return 0


def _check_gold(task: str, answer: Any) -> None:
    from megatron_vlrl.tasks import resolve

    resolve(task).check_gold(answer)


def _summary(folder: str | Path, manifest: Manifest) -> str:
    size = sum(entry.size for entry in manifest.shards)
    tasks = ", ".join(f"{task} {count}" for task, count in manifest.tasks.items())
    return f"{folder}: {manifest.samples} samples in {len(manifest.shards)} shards, {size / 1e6:.1f} MB ({tasks})"
