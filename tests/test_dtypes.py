"""Weights stored in bfloat16, float16 or several dtypes: held exactly where that can be, and given back as they lay."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_vlrl.backends import build_backend
from megatron_vlrl.checkpoint.convert import convert_from_hf, convert_to_hf
from megatron_vlrl.checkpoint.export import export_model
from megatron_vlrl.config.schema import ModelConfig
from megatron_vlrl.errors import ModelError
from megatron_vlrl.packing import pack
from megatron_vlrl.parallel.dims import ParallelDims
from tests.reference import at_rate, backend_options, make_groups, renderer_and_sampling
from tests.run_folder import Inputs, inputs, records, run, train, write_config  # noqa: F401
from tests.spawn import run_ranks
from tests.test_backend_state import surprise
from tests.tiny import make_tiny

Weights = dict[str, Tensor]
STORED: dict[str, Callable[[str], torch.dtype]] = {
    "float32": lambda name: torch.float32,
    "bfloat16": lambda name: torch.bfloat16,
    "float16": lambda name: torch.float16,
    "mixed": lambda name: torch.float32 if "norm" in name else torch.bfloat16,
}
HELD = ("float32", "bfloat16")
TWO_BY_TWO = ParallelDims(tensor=2, pipeline=2)


def stored_in(folder: Path, target: Path, dtype_of: Callable[[str], torch.dtype]) -> Path:
    shutil.copytree(folder, target)
    weights = {name: weight.to(dtype_of(name)) for name, weight in load_file(target / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def weight_bytes(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in each dtype, and "other" ones in float32."""
    root = tmp_path_factory.mktemp("models")
    plain = make_tiny(root / "plain", tied=False)
    return {
        **{name: stored_in(plain, root / name, dtype_of) for name, dtype_of in STORED.items()},
        "other": make_tiny(root / "other", tied=False, seed=1),
    }


def held(folder: Path, dtype: str, checkpoint: Path | None, out: Path | None) -> tuple[Weights, Weights]:
    """The weights that a backend of `dtype` begins with, and those after a step. out: where to export the first to."""
    renderer, sampling = renderer_and_sampling(folder)
    options = backend_options(folder, sampling)
    backend = build_backend(replace(options, model=ModelConfig(path=str(folder), dtype=dtype)))
    if checkpoint:
        backend.load(checkpoint)
    if out:
        export_model(backend, out, folder)
    begun = {name: weight.clone() for name, weight in backend.hf_weights()}
    backend.train_step([pack(make_groups(renderer)[:2])], surprise, at_rate(1e-2))
    moved = {name: weight.clone() for name, weight in backend.hf_weights()}
    backend.close()
    return begun, moved


def held_all(folders: dict[str, Path], root: Path) -> dict[tuple[str, str, str], tuple[Weights, Weights]]:
    """`held` of every stored dtype, held dtype and origin."""
    found = {}
    for stored in STORED:
        for dtype in HELD:
            out = root / f"{stored}-{dtype}"
            found[stored, dtype, "folder"] = held(folders[stored], dtype, None, out)
            if stored != "mixed":
                found[stored, dtype, "checkpoint"] = held(folders["other"], dtype, root / stored, None)
    return found


@pytest.fixture(scope="module")
def backends(folders, tmp_path_factory):
    """(what `held_all` found, the folder with its exports)."""
    root = tmp_path_factory.mktemp("held")
    for stored in STORED:
        if stored != "mixed":
            convert_from_hf(folders[stored], root / stored, TWO_BY_TWO)
    [found] = run_ranks(held_all, 1, folders, root, timeout=240.0)
    return found, root


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HELD)
@pytest.mark.parametrize("stored", STORED)
def test_a_backend_holds_the_stored_numbers(stored, dtype, folders, backends):
    """In float32 exactly, whatever they are stored in; in bfloat16 rounded once."""
    found, _ = backends
    begun, moved = found[stored, dtype, "folder"]
    source = load_file(folders[stored] / "model.safetensors")
    assert begun.keys() == source.keys()
    for name, weight in source.items():
        assert torch.equal(begun[name], weight.to(getattr(torch, dtype))), name
        assert not torch.equal(moved[name], begun[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HELD)
@pytest.mark.parametrize("stored", [name for name in STORED if name != "mixed"])
def test_a_converted_checkpoint_is_held_as_its_folder_is(stored, dtype, backends):
    """After a step too: the optimizer's own copy, of float32 where the model is of bfloat16, is the same."""
    found, _ = backends
    for ours, theirs in zip(found[stored, dtype, "checkpoint"], found[stored, dtype, "folder"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, weight in theirs.items():
            assert torch.equal(ours[name], weight), name


@pytest.mark.slow
@pytest.mark.parametrize("stored", STORED)
def test_what_was_held_in_float32_is_exported_bit_by_bit(stored, folders, backends):
    _, root = backends
    assert weight_bytes(root / f"{stored}-float32") == weight_bytes(folders[stored])


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_a_checkpoint_of_half_precision_comes_back_bit_by_bit(stored, folders, tmp_path):
    convert_from_hf(folders[stored], tmp_path / "checkpoint", TWO_BY_TWO)
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    assert weight_bytes(tmp_path / "hf") == weight_bytes(folders[stored])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int8])
def test_weights_that_no_run_holds_as_they_are_stored_are_refused(dtype, folders, tmp_path):
    folder = stored_in(folders["float32"], tmp_path / "model", lambda name: dtype)
    with pytest.raises(ModelError, match=rf"{dtype}.*float32, bfloat16 or float16 first"):
        convert_from_hf(folder, tmp_path / "checkpoint", TWO_BY_TWO)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HELD)
def test_a_run_from_a_folder_or_checkpoint_of_bfloat16(dtype, inputs, tmp_path):  # noqa: F811
    """Equal runs; in float32 the engine and the trainer agree as closely as ever; the model comes out in bfloat16."""
    folder = stored_in(inputs.model, tmp_path / "model", STORED["bfloat16"])
    convert_from_hf(folder, tmp_path / "checkpoint", TWO_BY_TWO)
    settings = {"model": {"path": str(folder), "dtype": dtype}, "train": {"steps": 2}}
    config = write_config(tmp_path / "run.yaml", inputs, **settings)
    run(train(config), 1, tmp_path / "out").ok()
    again = [f"run.resume={tmp_path / 'checkpoint'}", f"run.folder={tmp_path / 'again'}"]
    run(train(config, *again), 1, tmp_path / "out").ok()
    assert records(tmp_path / "again") == records(tmp_path / "run")
    assert all(step["mismatch_max"] < {"float32": 2e-5, "bfloat16": 0.2}[dtype] for step in records(tmp_path / "run"))
    exported, source = (load_file(path / "model.safetensors") for path in (tmp_path / "run/hf", folder))
    assert {weight.dtype for weight in exported.values()} == {torch.bfloat16}
    moved = [name for name in source if not torch.equal(exported[name], source[name])]
    assert len(moved) > len(source) / 2
