"""Conversion by tensor: bit-equal both ways at every layout, in the ranks' own format, loud before it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from megatron_vlrl.backends import build_backend
from megatron_vlrl.backends.megatron import shards
from megatron_vlrl.backends.megatron.backend import MegatronBackend
from megatron_vlrl.checkpoint.convert import convert_from_hf, convert_to_hf
from megatron_vlrl.cli import main
from megatron_vlrl.errors import CheckpointError, ConfigError, ModelError
from megatron_vlrl.parallel.dims import ParallelDims
from tests.reference import backend_options, local_state, renderer_and_sampling
from tests.spawn import run_ranks
from tests.tiny import make_tiny

DENSE = ["tied", "untied", "tied bf16", "untied bf16"]
LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "tp2 pp2": (2, 2), "pp2": (1, 2), "tp4 pp1": (4, 1), "tp4 pp2": (4, 2)}


def widened(folder: Path, target: Path) -> Path:
    """A copy whose config has four key/value heads, and weights for them, so that four tensor ranks can cut it."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config["text_config"]["num_key_value_heads"] = 4
    (target / "config.json").write_text(json.dumps(config))
    weights = load_file(target / "model.safetensors")
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            weights[name] = torch.cat([weights[name], weights[name] + 1.5])
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def in_bf16(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    weights = {name: weight.bfloat16() for name, weight in load_file(target / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {
        "tied": widened(make_tiny(root / "two", tied=True), root / "tied"),
        "untied": widened(make_tiny(root / "free", tied=False), root / "untied"),
    }
    made |= {f"{name} bf16": in_bf16(folder, root / f"{name}-bf16") for name, folder in made.items()}
    made["experts"] = make_tiny(root / "experts", moe=True, tied=False)
    made["experts alike"] = make_tiny(root / "alike", moe=True, layers=1)
    return made


EXPERTS_CUT = ParallelDims(tensor=2, pipeline=2, data=2, expert=2, sequence=True)


def weight_bytes(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", DENSE)
def test_a_round_trip_changes_no_bit(model, layout, models, tmp_path):
    tensor, pipeline = LAYOUTS[layout]
    convert_from_hf(models[model], tmp_path / "checkpoint", ParallelDims(tensor=tensor, pipeline=pipeline))
    assert len(list((tmp_path / "checkpoint").glob("*.distcp"))) == tensor * pipeline
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    assert weight_bytes(tmp_path / "hf") == weight_bytes(models[model])
    kept = {path.name for path in (tmp_path / "hf").iterdir()}
    assert kept == {path.name for path in models[model].iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "hf"]


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_come_back_as_they_lay_in_the_folder(transposed, models, tmp_path):
    def turn(weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            if ".experts." in name and transposed:
                weights[name] = weight.transpose(1, 2).contiguous()

    folder = broken(models["experts"], tmp_path / "model", turn)
    convert_from_hf(folder, tmp_path / "checkpoint", EXPERTS_CUT)
    assert len(list((tmp_path / "checkpoint").glob("*.distcp"))) == 8
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    assert weight_bytes(tmp_path / "hf") == weight_bytes(folder)


def backend_of(folder: Path, parallel: Mapping[str, int]) -> MegatronBackend:
    _, sampling = renderer_and_sampling(folder)
    backend = build_backend(backend_options(folder, sampling, **parallel))
    assert isinstance(backend, MegatronBackend)
    return backend


def save(folder: Path, target: Path, parallel: Mapping[str, int]) -> None:
    backend = backend_of(folder, parallel)
    backend.save(target)
    backend.close()


def layout_on_disk(folder: Path) -> dict[str, tuple[object, ...]]:
    """Name -> shape, dtype and blocks (offset, sizes) of every weight."""
    found: dict[str, tuple[object, ...]] = {}
    for key, entry in FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        if key.startswith(("language_model.", "vision_model.")) and hasattr(entry, "chunks"):
            blocks = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)
            found[key] = (tuple(entry.size), entry.properties.dtype, blocks)
    return found


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        pytest.param("tied", {"tensor": 2, "pipeline": 2}, marks=pytest.mark.slow),
        pytest.param("untied", {"tensor": 2, "pipeline": 2}, marks=pytest.mark.slow),
        ("experts", {"tensor": 2, "data": 2, "expert": 2, "sequence": True}),
        pytest.param("experts alike", {"tensor": 2, "data": 2, "expert": 2, "sequence": True}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_the_blocks_are_those_that_the_ranks_save_themselves(model, parallel, models, tmp_path):
    (tmp_path / "theirs").mkdir()
    run_ranks(save, 4, models[model], tmp_path / "theirs", parallel)
    convert_from_hf(models[model], tmp_path / "ours", ParallelDims(**parallel))
    assert layout_on_disk(tmp_path / "ours") == layout_on_disk(tmp_path / "theirs")


def start_from(folder: Path, checkpoint: Path, parallel: Mapping[str, int]) -> tuple[dict[str, Tensor], ...]:
    """Local state from `folder`, and from other weights after loading the checkpoint of `folder`."""
    wanted = backend_of(folder, parallel)
    with torch.no_grad():
        expected = {name: value.clone() for name, value in local_state(wanted).items()}
        for parameter in wanted.weights.parameters.values():
            parameter.zero_()
    wanted.load(checkpoint)
    loaded = {name: value.clone() for name, value in local_state(wanted).items()}
    wanted.close()
    return expected, loaded


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        *((model, {"tensor": 2, "pipeline": 2}) for model in ("tied", "untied", "untied bf16")),
        ("tied", {}),
        ("tied", {"pipeline": 2}),
        ("untied", {"tensor": 2}),
        ("untied", {"pipeline": 2, "virtual_pipeline": 2}),
        ("experts", {"data": 2, "expert": 2}),
        ("experts", {"tensor": 2, "sequence": True, "pipeline": 2}),
    ],
    ids=str,
)
def test_ranks_of_any_layout_load_it(model, parallel, models, tmp_path):
    cut = EXPERTS_CUT if model == "experts" else ParallelDims(tensor=2, pipeline=2)
    convert_from_hf(models[model], tmp_path / "checkpoint", cut)
    size = parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("data", 1)
    for expected, loaded in run_ranks(start_from, size, models[model], tmp_path / "checkpoint", parallel):
        assert expected.keys() == loaded.keys()
        for name, value in expected.items():
            assert torch.equal(loaded[name], value), name


@pytest.mark.slow
def test_a_checkpoint_of_a_run_comes_out_in_the_sources_dtype(models, tmp_path):
    (tmp_path / "saved").mkdir()
    run_ranks(save, 2, models["untied"], tmp_path / "saved", {"tensor": 2})
    finish(tmp_path / "saved")
    convert_to_hf(tmp_path / "saved", tmp_path / "wide", models["untied"])
    assert weight_bytes(tmp_path / "wide") == weight_bytes(models["untied"])
    convert_to_hf(tmp_path / "saved", tmp_path / "narrow", models["untied bf16"])
    assert weight_bytes(tmp_path / "narrow") == weight_bytes(models["untied bf16"])


def finish(folder: Path) -> None:
    from megatron_vlrl.checkpoint.convert import _finish

    _finish(folder, ParallelDims(tensor=2), {})


def broken(folder: Path, target: Path, change) -> Path:
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


NORM = "model.language_model.norm.weight"
BLOCK = "model.visual.blocks.0.attn.proj.weight"


def damage(weights: dict[str, Tensor]) -> None:
    del weights[NORM]
    weights["model.extra"] = torch.zeros(2)
    weights[BLOCK] = torch.zeros(2, 2)


def test_weights_that_do_not_fit_are_listed_before_anything_is_written(models, tmp_path):
    folder = broken(models["tied"], tmp_path / "model", damage)
    with pytest.raises(ModelError) as error:
        convert_from_hf(folder, tmp_path / "out", ParallelDims())
    for part in (f"missing ['{NORM}']", "extra ['model.extra']", f"{BLOCK} is [2, 2], expected [32, 32]"):
        assert part in str(error.value)
    mixed = broken(models["tied"], tmp_path / "mixed", lambda weights: weights.update({NORM: weights[NORM].bfloat16()}))
    with pytest.raises(ModelError, match=rf"several dtypes.*float32; {NORM} torch.bfloat16"):
        convert_from_hf(mixed, tmp_path / "out", ParallelDims())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixed", "model"]


def test_what_cannot_be_read_or_cut_is_refused(models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models["tied"], folder)
    with pytest.raises(ConfigError, match=r"tensor=3 does not divide"):
        convert_from_hf(folder, tmp_path / "out", ParallelDims(tensor=3))
    data = weight_bytes(folder)
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ModelError, match="download it again"):
        convert_from_hf(folder, tmp_path / "out", ParallelDims())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ModelError, match="'llama'"):
        convert_from_hf(folder, tmp_path / "out", ParallelDims())
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_left_alone(models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        convert_from_hf(models["tied"], tmp_path / "out", ParallelDims())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("file", ["__1_0.distcp", ".metadata", "common.pt", "hf/config.json"])
def test_a_flipped_bit_is_found_and_the_old_export_kept(file, models, tmp_path):
    convert_from_hf(models["tied"], tmp_path / "checkpoint", ParallelDims(tensor=2))
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    before = weight_bytes(tmp_path / "hf")
    path = tmp_path / "checkpoint" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=rf"{file} does not match its SHA-256; nothing was written"):
        convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    assert weight_bytes(tmp_path / "hf") == before


@pytest.mark.parametrize("place", [2, 30, -2, None], ids=["header", "pickle", "directory", "gone"])
def test_a_file_that_cannot_even_be_read_is_called_damaged(place, models, tmp_path):
    """The files are read while they are verified: what goes wrong in reading has its cause named all the same."""
    convert_from_hf(models["tied"], tmp_path / "checkpoint", ParallelDims(tensor=2))
    path = tmp_path / "checkpoint" / "__1_0.distcp"
    data = bytearray(path.read_bytes())
    if place is None:
        path.unlink()
    else:
        data[place] ^= 255
        path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"is damaged: __1_0.distcp .*; nothing was written") as error:
        convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    assert ("cannot be read" if place is None else "does not match its SHA-256") in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


OTHERWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "turned": lambda block: block.transpose(0, -1).contiguous().transpose(0, -1),
    "between others": lambda block: torch.cat([block.flatten() + 1, block.flatten()])[block.numel() :].view(
        block.shape
    ),
    "in another dtype": lambda block: block.half(),
}


@pytest.mark.parametrize("how", OTHERWISE)
def test_blocks_that_lie_otherwise_in_a_file_are_read_too(how, models, tmp_path, monkeypatch):
    """As whoever saved them had them in memory."""

    def append(file: BinaryIO, block: Tensor) -> tuple[int, int]:
        start = file.tell()
        torch.save(OTHERWISE[how](block), file)
        return start, file.tell() - start

    monkeypatch.setattr(shards, "_append", append)
    convert_from_hf(models["untied bf16"], tmp_path / "checkpoint", ParallelDims(tensor=2))
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    written, given = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", models["untied bf16"]))
    assert written.keys() == given.keys()
    for name, weight in given.items():
        assert torch.equal(written[name], OTHERWISE[how](weight).bfloat16()), name


def test_a_checkpoint_of_another_model_is_refused(models, tmp_path):
    convert_from_hf(models["untied"], tmp_path / "checkpoint", ParallelDims())
    with pytest.raises(CheckpointError, match=r"another model.*extra \['language_model.output_layer.weight'\]"):
        convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf", models["tied"])
    small = make_tiny(tmp_path / "small", layers=2)
    with pytest.raises(CheckpointError, match=r"input_layernorm.weight is \[4, 64\], expected \[2, 64\]"):
        convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf", small)
    assert not (tmp_path / "hf").exists()


def test_the_command_goes_both_ways_and_warns_of_a_missing_tokenizer(models, tmp_path, caplog, capsys):
    folder = tmp_path / "model"
    shutil.copytree(models["untied bf16"], folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    out, back = str(tmp_path / "checkpoint"), str(tmp_path / "hf")
    assert main(["convert", "--from-hf", str(folder), "--to", out, "--tensor", "2", "--pipeline", "2"]) == 0
    assert "has no tokenizer" in caplog.text
    assert main(["convert", "--from", out, "--to-hf", back]) == 0
    assert weight_bytes(tmp_path / "hf") == weight_bytes(folder)
    assert main(["convert", "--from", out, "--to-hf", back, "--tensor", "2"]) == 2
    assert main(["convert", "--from-hf", str(folder), "--to-hf", back]) == 2
    assert main(["convert", "--from", str(tmp_path), "--to-hf", back]) == 2
    assert capsys.readouterr().err.count("error: ") == 3
