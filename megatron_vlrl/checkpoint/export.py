"""Weights by Hugging Face name -> a folder that transformers loads: all or nothing, one tensor in memory at a time.

In: an iterator of (name, tensor), and the folder that the model came from. Out: sharded safetensors with an index,
beside the source's config, tokenizer, processor, generation config and chat template.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from megatron_vlrl.backends.protocol import Backend
from megatron_vlrl.checkpoint.beside import flushed_early
from megatron_vlrl.checkpoint.files import flush, flush_folders, list_files
from megatron_vlrl.errors import CheckpointError, ModelError, VLRLError
from megatron_vlrl.models.hf_files import HFWeights, TensorInfo
from megatron_vlrl.models.hf_write import write_safetensors

_log = logging.getLogger(__name__)

_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt")  # config, tokenizer, processor, templates; no code
_COPIED_STEMS = ("LICENSE", "NOTICE")
_COPIED_FOLDERS = ("additional_chat_templates",)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
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
    expected: Mapping[str, TensorInfo] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: float = 5e9,
) -> None:
    """Write the folder `out`; what was there is replaced at the end, and only if all went well.

    expected: names, shapes and dtypes of the weights; None takes the source's own weights for them, and whatever
    differs raises ModelError with a list. dtype: of the floating-point tensors; None gives each the expected one.
    shard_bytes: largest weight file, unless one tensor alone is larger. A disk that cannot hold the folder raises
    CheckpointError. `weights` is drawn to its end in either case: other ranks help to make it, while one rank calls
    this.
    """
    out, source = Path(out).absolute(), Path(source).absolute()
    part = out.with_name(f".{out.name}.part-{secrets.token_hex(4)}")
    try:
        _check_target(out, source)
        wanted = _in_dtype(HFWeights(source).infos() if expected is None else expected, dtype)
        _remove_leftovers(out)
        part.mkdir(parents=True)
        copy_settings(source, part, dtype)
        with flushed_early(part):
            write_safetensors(part, _checked(weights, wanted, source), wanted, shard_bytes)
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


def _in_dtype(expected: Mapping[str, TensorInfo], dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    if dtype is None:
        return dict(expected)
    return {
        name: TensorInfo(info.shape, dtype) if info.dtype.is_floating_point else info for name, info in expected.items()
    }


def _checked(
    weights: Iterator[tuple[str, torch.Tensor]], expected: Mapping[str, TensorInfo], source: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor on the host in the dtype to write; after the last one ModelError if any did not fit."""
    seen, wrong = set[str](), []
    for name, tensor in weights:
        if name in seen:
            wrong.append(f"twice {name}")
        elif name not in expected:
            wrong.append(f"extra {name}")
        elif tuple(tensor.shape) != expected[name].shape:
            wrong.append(f"misshapen {name} ({list(tensor.shape)} instead of {list(expected[name].shape)})")
        elif tensor.is_floating_point() != expected[name].dtype.is_floating_point:
            wrong.append(f"{name} of dtype {tensor.dtype} instead of {expected[name].dtype}")
        elif not wrong:
            yield name, tensor.detach().to("cpu", expected[name].dtype)
        seen.add(name)
    wrong += [f"missing {name}" for name in sorted(set(expected) - seen)]
    if wrong:
        listed = "; ".join(wrong[:_LISTED]) + ("; ..." if len(wrong) > _LISTED else "")
        raise ModelError(f"{len(wrong)} weights do not fit {source}, nothing was exported: {listed}")


def copy_settings(source: Path, out: Path, dtype: torch.dtype | None = None) -> None:
    """Copy everything of the folder `source` but weights and code: config, tokenizer, processor, templates, terms.

    dtype: the one that the copied config shall name.
    """
    if not any((source / name).is_file() for name in _TOKENIZERS):
        _log.warning("%s has no tokenizer (none of %s); the result has none either", source, ", ".join(_TOKENIZERS))
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
