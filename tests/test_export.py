"""Export to a Hugging Face folder, and the reading of such folders: bit-equal, whole, and loud when it does not fit."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlrl.checkpoint.export import export_hf
from megatron_vlrl.errors import CheckpointError, ModelError
from megatron_vlrl.models.hf_files import HFWeights
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def source(tmp_path) -> Path:
    """A folder with everything but a model that could be built; small, to be broken."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in (
        "tokenizer.json",
        "preprocessor_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "merges.txt",
    ):
        (folder / name).write_text(f"{name} {{}}")
    (folder / "LICENSE").write_text("terms")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("t")
    for name in ("README.md", "modeling.py", "pytorch_model.bin", "pytorch_model.bin.index.json", ".hidden.json"):
        (folder / name).write_text("not to be copied")
    config = {
        "dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "n": 1},
        "vision_config": {"torch_dtype": "bfloat16"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: value.bfloat16() if value.is_floating_point() else value for name, value in changed().items()},
        folder / "model.safetensors",
    )
    return folder


def changed() -> dict[str, torch.Tensor]:
    """What a trainer would hold for `source`."""
    generator = torch.Generator().manual_seed(1)
    weights = {f"w{i}": torch.randn(16, 8, generator=generator) for i in range(5)}
    return {**weights, "scalar": torch.tensor(3.5), "steps": torch.arange(4), "none": torch.zeros(0, 3)}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    config = model.config
    image = [config.vision_start_token_id] + [config.image_token_id] * 4 + [config.vision_end_token_id]
    patches = torch.randn(16, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[300, 301, *image, 302, 303, 304]])
    with torch.no_grad():
        return model(
            input_ids=tokens,
            pixel_values=patches,
            image_grid_thw=torch.tensor([[1, 4, 4]]),
            mm_token_type_ids=(tokens == config.image_token_id).int(),
        ).logits


def test_exported_models_load_in_transformers_with_equal_logits(tiny, tmp_path):
    from transformers import AutoProcessor

    weights = HFWeights(tiny)
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    export_hf(whole, tiny, weights.items())
    export_hf(sharded, tiny, weights.items(), shard_bytes=40_000)
    assert [path.name for path in whole.glob("*.safetensors*")] == ["model.safetensors"]
    shards = sorted(path.name for path in sharded.glob("model-*.safetensors"))
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    assert len(shards) > 5
    for folder in (whole, sharded):
        again = HFWeights(folder)
        assert again.names == weights.names
        assert all(torch.equal(again.get(name), weights.get(name)) for name in weights.names)
        assert torch.equal(logits(folder), logits(tiny))
        assert type(AutoProcessor.from_pretrained(folder)).__name__ == "Qwen3VLProcessor"
        kept = {name: data for name, data in folder_bytes(folder).items() if "safetensors" not in name}
        assert kept == {name: data for name, data in folder_bytes(tiny).items() if "safetensors" not in name}


def test_other_weights_are_really_exported(tiny, tmp_path):
    export_hf(tmp_path / "out", tiny, ((name, value * 1.5) for name, value in HFWeights(tiny).items()))
    assert not torch.allclose(logits(tmp_path / "out"), logits(tiny), rtol=0.1)


def test_float32_weights_go_into_the_sources_dtype_or_the_one_asked_for(source, tmp_path):
    export_hf(tmp_path / "same", source, iter(changed().items()))
    export_hf(tmp_path / "float", source, iter(changed().items()), dtype=torch.float32)
    same, wide = load_file(tmp_path / "same" / "model.safetensors"), load_file(tmp_path / "float" / "model.safetensors")
    for name, value in changed().items():
        expected = value.bfloat16() if value.is_floating_point() else value
        assert same[name].dtype == expected.dtype
        assert torch.equal(same[name], expected)
        assert wide[name].dtype == value.dtype
        assert torch.equal(wide[name], value)
    assert (tmp_path / "same" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert json.loads((tmp_path / "float" / "config.json").read_text()) == {
        "dtype": "float32",
        "text_config": {"dtype": "float32", "n": 1},
        "vision_config": {"torch_dtype": "float32"},
    }


def test_what_belongs_to_a_model_is_copied_and_nothing_else(source, tmp_path):
    export_hf(tmp_path / "out", source, iter(changed().items()))
    assert sorted(folder_bytes(tmp_path / "out")) == [
        "LICENSE",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
    ]


def test_a_backend_may_reuse_the_memory_of_the_last_tensor(source, tmp_path):
    def reused() -> Iterator[tuple[str, torch.Tensor]]:
        buffer = torch.empty(16, 8)
        for name, value in changed().items():
            yield name, buffer.copy_(value) if value.shape == buffer.shape else value

    export_hf(tmp_path / "out", source, reused(), dtype=torch.float32)
    assert torch.equal(HFWeights(tmp_path / "out").get("w0"), changed()["w0"])


def test_a_set_of_weights_that_does_not_fit_is_listed_and_leaves_the_old_export(source, tmp_path):
    out = tmp_path / "out"
    export_hf(out, source, iter(changed().items()))
    before = folder_bytes(out)
    weights = changed()
    del weights["w1"]
    weights.update(w2=torch.zeros(8, 16), steps=torch.zeros(4), extra=torch.zeros(1))
    drawn = iter([*weights.items(), ("w0", weights["w0"])])
    with pytest.raises(ModelError) as error:
        export_hf(out, source, drawn, shard_bytes=100)
    for part in (
        "5 weights",
        "missing w1",
        "misshapen w2 ([8, 16] instead of [16, 8])",
        "steps of dtype",
        "extra extra",
        "twice w0",
    ):
        assert part in str(error.value)
    assert next(drawn, None) is None  # other ranks take part in every tensor
    assert folder_bytes(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_leftovers_of_a_killed_export_are_cleared_and_neighbours_kept(source, tmp_path):
    for name in (".out.part-0123abcd", ".out.old-0123abcd", ".outer.part-0123abcd", ".out.mine"):
        (tmp_path / name).mkdir()
    export_hf(tmp_path / "out", source, iter(changed().items()))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".out.mine",
        ".out.old-0123abcd",
        ".outer.part-0123abcd",
        "out",
        "source",
    ]
    export_hf(tmp_path / "out", source, iter(changed().items()))
    assert not (tmp_path / ".out.old-0123abcd").exists()


def test_targets_that_would_destroy_something_are_refused(source, tmp_path):
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "thesis.txt").write_text("years")
    for target, words in ((source, "own source"), (tmp_path, "own source"), (documents, "no Hugging Face folder")):
        drawn = iter(changed().items())
        with pytest.raises(ModelError, match=words):
            export_hf(target, source, drawn)
        assert next(drawn, None) is None
    assert (documents / "thesis.txt").read_text() == "years"


def test_a_full_disk_keeps_the_old_export(source, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        export_hf(disk / "out", source, iter(changed().items()))
        before = folder_bytes(disk / "out")
        big = {**changed(), "w0": torch.zeros(300, 300)}
        save_file(big, source / "model.safetensors")
        drawn = iter(big.items())
        with pytest.raises(CheckpointError, match=r"could not be exported.*free space"):
            export_hf(disk / "out", source, drawn, shard_bytes=1)
        assert next(drawn, None) is None
        assert folder_bytes(disk / "out") == before
        assert [path.name for path in disk.iterdir()] == ["out"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("reason", [errno.EOPNOTSUPP, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_room_is_asked_for_before_anything_is_written(source, tmp_path, monkeypatch, reason):
    """The disk may be unable to set room aside, or have none left."""

    def refuse(*_: int) -> int:
        ctypes.set_errno(reason)
        return -1

    export_hf(tmp_path / "room", source, iter(changed().items()), shard_bytes=600)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(fallocate=refuse))
    weights = iter(changed().items())
    if reason == errno.EOPNOTSUPP:
        export_hf(tmp_path / "none", source, weights, shard_bytes=600)
        assert folder_bytes(tmp_path / "none") == folder_bytes(tmp_path / "room")
    else:
        with pytest.raises(CheckpointError, match=rf"could not be exported.*{os.strerror(reason)}.*free space"):
            export_hf(tmp_path / "none", source, weights, shard_bytes=600)
        assert not (tmp_path / "none").exists()


def test_reading_is_lazy_and_headers_need_no_torch(source):
    code = "import sys; from pathlib import Path; from megatron_vlrl.models.hf_files import HFWeights; "
    code += f"w = HFWeights(Path({str(source)!r})); print(w.names, w.shape('w0')); assert 'torch' not in sys.modules"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "('none', 'scalar', 'steps', 'w0', 'w1', 'w2', 'w3', 'w4') (16, 8)\n"
    weights = HFWeights(source)
    assert (weights.shape("scalar"), weights.dtype("w0"), weights.dtype("steps")) == ((), torch.bfloat16, torch.int64)
    with pytest.raises(ModelError, match="no tensor 'w9'"):
        weights.get("w9")


@pytest.fixture
def sharded(source, tmp_path) -> Path:
    export_hf(tmp_path / "sharded", source, iter(changed().items()), shard_bytes=600)
    return tmp_path / "sharded"


def test_a_half_downloaded_folder_is_found_before_any_tensor_is_read(sharded):
    first = next(iter(sorted(sharded.glob("model-*"))))
    whole = first.read_bytes()
    for data in (b"", whole[:5], whole[:50], whole[:-1], whole + b"x", b"\xff" * len(whole)):
        first.write_bytes(data)
        with pytest.raises(ModelError, match=first.name):
            HFWeights(sharded)
    first.unlink()
    with pytest.raises(ModelError, match=rf"{first.name}, not in the folder.*download"):
        HFWeights(sharded)
    first.write_bytes(whole)
    assert torch.equal(HFWeights(sharded).get("w0"), changed()["w0"].bfloat16())


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "not an index"),
        ("[]", "not an index"),
        ('{"weight_map": {"w0": 3}}', "outside its folder"),
        ('{"weight_map": {"w0": "../source/model.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"w9": "model-00001-of-00003.safetensors"}}', "w9"),
    ],
)
def test_a_bad_index_is_refused(sharded, index, words):
    assert (sharded / "model-00001-of-00003.safetensors").is_file()
    (sharded / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=words):
        HFWeights(sharded)


def header_file(path: Path, header: object, data: bytes) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"w": {}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"w": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"w": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}},
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header):
    header_file(tmp_path / "model.safetensors", header, bytes(4))
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        HFWeights(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        HFWeights(tmp_path)
