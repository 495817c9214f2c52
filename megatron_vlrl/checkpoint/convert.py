"""Hugging Face folders to checkpoints and back: in one process, one tensor in memory at a time, all or nothing.

A converted checkpoint holds weights only, as step 0 of a run, and beside them what the way back needs: in `hf/` the
config, tokenizer, processor and generation settings, in `weights.json` the shape and dtype that every tensor had.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError

from megatron_vlrl.backends.layout import check_layout
from megatron_vlrl.backends.megatron.shards import SHARD_SUFFIX, shard_names, write_shards
from megatron_vlrl.backends.megatron.stored import StoredWeights
from megatron_vlrl.backends.megatron.weights import check_complete
from megatron_vlrl.checkpoint.beside import GrowingFiles, flushed_early
from megatron_vlrl.checkpoint.export import copy_settings, export_hf
from megatron_vlrl.checkpoint.files import flush, flush_folders, list_files
from megatron_vlrl.checkpoint.manifest import FileRecord, Manifest, check_file, describe_file
from megatron_vlrl.checkpoint.state import STATE_FILE, RunState, summary
from megatron_vlrl.errors import CheckpointError, ModelError
from megatron_vlrl.models.hf_files import HFWeights, TensorInfo
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.models.qwen3_vl.names import as_stored, hf_shapes
from megatron_vlrl.parallel.dims import ParallelDims

SETTINGS_FOLDER, INFOS_FILE = "hf", "weights.json"
_HASHERS = min(4, max(1, (os.cpu_count() or 1) - 1))  # threads, beside the one that reads and writes
_LISTED = 5  # tensors named in an error
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # a run in float32 holds each exactly


def convert_from_hf(source: Path, out: Path, dims: ParallelDims) -> None:
    """Write the checkpoint `out`, cut for `dims`, from the Hugging Face folder `source`.

    `run.resume` takes it at any layout. `out` must not exist, or be empty. ModelError, ConfigError, before anything is
    written, if the weights are incomplete, do not fit the config, differ in dtype, or cannot be cut so.
    """
    source, out = Path(source).absolute(), Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder; choose another or empty it")
    spec = Qwen3VLSpec.load(source)
    weights = HFWeights(source)
    infos = weights.infos()
    check_complete(weights, as_stored(hf_shapes(spec), _shapes(infos)))
    _check_dtype(source, infos)
    check_layout(spec, dims)
    part = out.with_name(f".{out.name}.part-{secrets.token_hex(4)}")
    try:
        (part / SETTINGS_FOLDER).mkdir(parents=True)
        copy_settings(source, part / SETTINGS_FOLDER)
        shards = GrowingFiles([part / name for name in shard_names(dims)])
        with flushed_early(part), shards.followed():
            write_shards(part, weights, spec, dims)
        (part / INFOS_FILE).write_text(_infos_text(infos), encoding="utf-8")
        start = RunState(step=0, updates=0, cursor={}, algorithm={}, model=summary(spec), config={})
        (part / STATE_FILE).write_text(json.dumps(start.to_dict()), encoding="utf-8")
        _finish(part, dims, shards.records())
        part.rename(out)  # an empty folder is replaced
        flush(out.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer has RuntimeError for a full disk
        raise CheckpointError(
            f"{source} could not be converted to {out}: {error}; free space on that disk or choose another folder"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def convert_to_hf(checkpoint: Path, out: Path, source: Path | None = None) -> None:
    """Write the Hugging Face folder `out` from a checkpoint's weights, if every file of it is verified.

    source: the folder that the checkpoint's run started from, for settings and dtype; None for a converted
    checkpoint, which keeps its settings and gives its weights as they are. What was in `out` is replaced at the end.
    """
    files = Manifest.read(checkpoint).files
    shards = {name: record for name, record in files.items() if name.endswith(SHARD_SUFFIX)}
    check = partial(check_file, checkpoint)
    _refuse_damaged(checkpoint, [check(name, record) for name, record in files.items() if name not in shards])
    settings = checkpoint / SETTINGS_FOLDER if source is None else source
    infos = _read_infos(checkpoint / INFOS_FILE) if source is None else HFWeights(source).infos()
    spec = Qwen3VLSpec.load(settings)
    stored = StoredWeights.open(checkpoint, spec, as_stored(hf_shapes(spec), _shapes(infos)))
    with ThreadPoolExecutor(_HASHERS) as pool:  # beside the reading
        checks = pool.map(check, shards.keys(), shards.values())
        export_hf(out, settings, _verified(stored.items(), checkpoint, checks), expected=infos)


def _verified(
    weights: Iterator[tuple[str, torch.Tensor]], checkpoint: Path, checks: Iterable[str | None]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights; at their end, or if they cannot be read, CheckpointError if a check has found damage."""
    try:
        yield from weights
    finally:
        _refuse_damaged(checkpoint, checks)


def _refuse_damaged(checkpoint: Path, checks: Iterable[str | None]) -> None:
    problems = [problem for problem in checks if problem]
    if problems:
        raise CheckpointError(f"{checkpoint} is damaged: {'; '.join(problems)}; nothing was written")


def _shapes(infos: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in infos.items()}


def _infos_text(infos: Mapping[str, TensorInfo]) -> str:
    plain = {
        name: {"dtype": str(info.dtype).removeprefix("torch."), "shape": info.shape} for name, info in infos.items()
    }
    return json.dumps(plain, indent=1) + "\n"


def _read_infos(path: Path) -> dict[str, TensorInfo]:
    raw = json.loads(path.read_text(encoding="utf-8"))
    return {name: TensorInfo(tuple(info["shape"]), getattr(torch, info["dtype"])) for name, info in raw.items()}


def _check_dtype(source: Path, infos: Mapping[str, TensorInfo]) -> None:
    usual = Counter(info.dtype for info in infos.values()).most_common(1)[0][0]
    others = [f"{name} {info.dtype}" for name, info in infos.items() if info.dtype != usual]
    if others or usual not in _DTYPES:
        listed = ", ".join(others[:_LISTED]) + (", ..." if len(others) > _LISTED else "")
        raise ModelError(
            f"{source} has weights of several dtypes, or of one that no run holds as it is stored ({usual}; {listed}); "
            "save the model in float32, bfloat16 or float16 first"
        )


def _finish(folder: Path, dims: ParallelDims, hashed: Mapping[Path, FileRecord]) -> None:
    """Flush what was written, and name it in a manifest. hashed: what need not be read again for it."""
    names = list_files(folder)
    for name in names:
        flush(folder / name)
    files = {name: hashed.get(folder / name) or describe_file(folder, name) for name in names}
    Manifest(step=0, sequence=1, layout=asdict(dims), files=files).write(folder)
    flush_folders(folder)
