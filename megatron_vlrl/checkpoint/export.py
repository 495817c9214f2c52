"""Weights by Hugging Face name -> a folder that transformers loads: all or nothing, one shard in memory at a time.

In: an iterator of (name, tensor), and the folder that the model came from. Out: sharded safetensors with an index,
beside the source's config, tokenizer, processor, generation config and chat template.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_vlrl.backends.protocol import Backend
from megatron_vlrl.checkpoint.files import flush, flush_folders, list_files
from megatron_vlrl.errors import CheckpointError, ModelError, VLRLError
from megatron_vlrl.models.hf_files import INDEX_NAME, WEIGHTS_NAME, HFWeights

_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt")  # config, tokenizer, processor, templates; no code
_COPIED_STEMS = ("LICENSE", "NOTICE")
_COPIED_FOLDERS = ("additional_chat_templates",)
_LISTED = 20  # tensors named in an error


def export_model(backend: Backend, out: Path, source: Path) -> None:
    """Write a backend's weights as the Hugging Face folder `out`; collective: all ranks gather them, rank 0 writes."""
    weights = backend.hf_weights()
    if backend.groups.is_main:
        export_hf(out, source, weights)
    for _ in weights:
        pass


def export_hf(
    out: Path,
    source: Path,
    weights: Iterator[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: float = 5e9,
) -> None:
    """Write the folder `out`; what was there is replaced at the end, and only if all went well.

    dtype: of the floating-point tensors; None gives each the source's. shard_bytes: largest weight file, unless one
    tensor alone is larger. Names and shapes must be the source's (ModelError lists what differs). A disk that cannot
    hold the folder raises CheckpointError. `weights` is drawn to its end in either case: other ranks help to make it,
    while one rank calls this.
    """
    out, source = Path(out).absolute(), Path(source).absolute()
    part = out.with_name(f".{out.name}.part-{secrets.token_hex(4)}")
    try:
        _check_target(out, source)
        expected = HFWeights(source)
        _remove_leftovers(out)
        part.mkdir(parents=True)
        _copy_files(source, part, dtype)
        _write_weights(part, _checked(weights, expected, dtype), shard_bytes)
        for name in list_files(part):
            flush(part / name)
        flush_folders(part)
        _replace(out, part)
    except (VLRLError, OSError, SafetensorError) as error:
        for _ in weights:
            pass
        if isinstance(error, VLRLError):
            raise
        raise CheckpointError(
            f"the model could not be exported to {out}: {error}; free space on that disk or choose another folder"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_target(out: Path, source: Path) -> None:
    if source.resolve().is_relative_to(out.resolve()):
        raise ModelError(f"the export to {out} would replace its own source {source}; choose another folder")
    if out.exists() and not (out.is_dir() and ((out / "config.json").is_file() or not any(out.iterdir()))):
        raise ModelError(f"{out} exists and is no Hugging Face folder (no config.json); choose another or empty it")


def _checked(
    weights: Iterator[tuple[str, torch.Tensor]], expected: HFWeights, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor copied to the host in the dtype to write; after the last one ModelError if any did not fit."""
    names, seen, wrong = set(expected.names), set[str](), []
    for name, tensor in weights:
        if name in seen:
            wrong.append(f"twice {name}")
        elif name not in names:
            wrong.append(f"extra {name}")
        elif tuple(tensor.shape) != expected.shape(name):
            wrong.append(f"misshapen {name} ({list(tensor.shape)} instead of {list(expected.shape(name))})")
        elif tensor.is_floating_point() != expected.dtype(name).is_floating_point:
            wrong.append(f"{name} of dtype {tensor.dtype} instead of {expected.dtype(name)}")
        elif not wrong:
            kind = dtype if dtype is not None and tensor.is_floating_point() else expected.dtype(name)
            # A copy always: the next tensor may reuse this one's memory, and the shard keeps it until it is full.
            yield name, tensor.detach().to("cpu", kind, copy=True, memory_format=torch.contiguous_format)
        seen.add(name)
    wrong += [f"missing {name}" for name in sorted(names - seen)]
    if wrong:
        listed = "; ".join(wrong[:_LISTED]) + ("; ..." if len(wrong) > _LISTED else "")
        raise ModelError(f"{len(wrong)} weights do not fit {expected.folder}, nothing was exported: {listed}")


def _write_weights(folder: Path, weights: Iterator[tuple[str, torch.Tensor]], shard_bytes: float) -> None:
    """One file if all fits, else numbered shards and an index. The count of shards is known, and named, at the end."""
    shard: dict[str, torch.Tensor] = {}
    held, total = 0, 0
    shards: list[list[str]] = []
    for name, tensor in weights:
        if shard and held + tensor.nbytes > shard_bytes:
            shards.append(_write_shard(folder, len(shards), shard))
            held = 0
        shard[name] = tensor
        held += tensor.nbytes
        total += tensor.nbytes
    shards.append(_write_shard(folder, len(shards), shard))
    if len(shards) == 1:
        _shard_path(folder, 0).rename(folder / WEIGHTS_NAME)
        return
    placed = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _shard_path(folder, number).rename(folder / final)
        placed.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(folder: Path, number: int, shard: dict[str, torch.Tensor]) -> list[str]:
    """Write and empty `shard`; the names it held."""
    path = _shard_path(folder, number)
    save_file(shard, path, metadata={"format": "pt"})
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # safetensors makes its files private; these are as readable as their neighbours
    names = list(shard)
    shard.clear()
    return names


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number}"


def _copy_files(source: Path, out: Path, dtype: torch.dtype | None) -> None:
    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name in _COPIED_FOLDERS:
            shutil.copytree(path, out / path.name, copy_function=shutil.copyfile)
        elif path.is_file() and _is_copied(path):
            shutil.copyfile(path, out / path.name)
    config = out / "config.json"
    if dtype is not None:
        renamed = _with_dtype(json.loads(config.read_text(encoding="utf-8")), str(dtype).removeprefix("torch."))
        config.write_text(json.dumps(renamed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_copied(path: Path) -> bool:
    if path.name.startswith(".") or path.name.endswith(".index.json"):
        return False
    return path.suffix in _COPIED_SUFFIXES or path.stem in _COPIED_STEMS


def _with_dtype(config: Any, dtype: str) -> Any:
    """The config with every dtype it names replaced: transformers loads in that dtype, whatever the files hold."""
    if not isinstance(config, dict):
        return config
    named = ("dtype", "torch_dtype")
    return {key: dtype if key in named else _with_dtype(value, dtype) for key, value in config.items()}


def _replace(out: Path, part: Path) -> None:
    """Put `part` in the place of `out`; a crash between the two renames leaves both folders whole under other names."""
    if out.exists():
        old = out.with_name(f".{out.name}.old-{secrets.token_hex(4)}")
        out.rename(old)
        part.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        part.rename(out)
    flush(out.parent)


def _remove_leftovers(out: Path) -> None:
    """Delete what an export that was killed left behind; the replaced model only if its successor is in place."""
    for path in out.parent.iterdir() if out.parent.is_dir() else ():
        leftover = re.fullmatch(rf"\.{re.escape(out.name)}\.(part|old)-[0-9a-f]{{8}}", path.name)
        if leftover and (leftover[1] == "part" or out.exists()):
            shutil.rmtree(path, ignore_errors=True)
