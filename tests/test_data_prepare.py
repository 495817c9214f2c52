"""JSONL + images -> shards: what is written, that it can be read by others, and every refusal with its line number."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from megatron_vlrl.data import manifest as manifests
from megatron_vlrl.data.objects import open_store
from megatron_vlrl.data.prepare import prepare
from megatron_vlrl.errors import ConfigError, DataError
from tests.data_folder import line, make_shards, png, write_source


def _prepare(folder: Path, records, **options):
    jsonl, images = write_source(folder, records)
    return prepare(jsonl, images, folder / "out", 2, **options)


def test_manifest_index_and_tar_agree(tmp_path):
    records = [line("a"), line("b", "box", answer=[0, 0, 1, 1]), line("ключ", meta={"x": 1}), line("c-1"), line("d")]
    written = _prepare(tmp_path, records)
    out = tmp_path / "out"
    assert written == _load(out) == manifests.verify(open_store(out))
    assert [s.name for s in written.shards] == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert [s.samples for s in written.shards] == [2, 2, 1]
    assert dict(written.tasks) == {"count": 4, "box": 1}
    assert sorted(os.listdir(out)) == ["index.npz", "manifest.json", *[s.name for s in written.shards]]

    index = manifests.load_index(open_store(out), written)
    tasks = list(written.tasks)
    assert [index.key(i) for i in range(len(index))] == [r["key"] for r in records]
    assert [tasks[t] for t in index.task] == [r["task"] for r in records]
    for i, record in enumerate(records):  # the standard library's tar reader is the oracle
        with tarfile.open(out / written.shards[index.shard[i]].name) as tar:
            names = [m.name for m in tar if index.offset[i] <= m.offset < index.offset[i] + index.size[i]]
            assert sorted(names) == sorted([f"{record['key']}.0.png", f"{record['key']}.json"])
            image = tar.extractfile(f"{record['key']}.0.png")
            assert image is not None
            assert image.read() == (tmp_path / "images" / f"{record['key']}.png").read_bytes()


def test_webdataset_reads_the_shards(tmp_path):
    import webdataset

    folder = make_shards(tmp_path, {"count": 5, "read": 4})
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [f"count-{n}" for n in range(5)] + [f"read-{n}" for n in range(4)]
    assert json.loads(samples[6]["json"])["answer"] == "1"
    assert samples[6]["0.png"] == png(6)


def test_same_input_gives_the_same_bytes(tmp_path):
    first, second = (make_shards(tmp_path / name, {"count": 9, "box": 3}) for name in ("one", "two"))
    os.utime(second)
    names = sorted(os.listdir(first))
    assert names == sorted(os.listdir(second))
    assert [(first / n).read_bytes() for n in names] == [(second / n).read_bytes() for n in names]


def test_images_are_named_by_content_and_may_be_none_or_many(tmp_path):
    records = [line("none", images=[]), line("many", images=["many.png"] * 11), line("sub", images=["deep/x.JPEG"])]
    jsonl, images = write_source(tmp_path, records)
    (images / "deep").mkdir()
    (images / "deep" / "x.JPEG").write_bytes(png(3))  # a PNG whatever it is called
    written = prepare(jsonl, images, tmp_path / "out", 10)
    with tarfile.open(tmp_path / "out" / written.shards[0].name) as tar:
        names = tar.getnames()
    assert "sub.0.png" in names
    assert sum(name.startswith("many.") for name in names) == 12
    assert sum(name.startswith("none.") for name in names) == 1


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        (json.dumps({"key": "b"}), "missing field 'task'"),
        (json.dumps(line("b", promt="x")), "unknown field 'promt'; did you mean 'prompt'"),
        (json.dumps(line("a")), "key 'a' was used before, in line 1"),
        (json.dumps(line("x/y")), "key 'x/y'"),
        (json.dumps(line("x.y")), "key 'x.y'"),
        (json.dumps(line("")), "key must be a string"),
        (json.dumps(line("k" * 81)), "longer than 80 bytes"),
        (json.dumps(line("b", images=["absent.png"])), "absent.png"),
        (json.dumps(line("b", images=["../data.jsonl"])), "leads out of the folder"),
        (json.dumps(line("b", images=["/etc/hostname"])), "leads out of the folder"),
        (json.dumps(line("b", images=["link.png"])), "leads out of the folder"),
        (json.dumps(line("b", images=["text.png"])), "no PNG, JPEG or WebP"),
        (json.dumps(line("b", images="a.png")), "images must be a list"),
        (json.dumps(line("b", images=["a.png"], prompt="<image><image>")), "1 images but 2 <image> marks"),
        (json.dumps(line("b", images=[], prompt=[{"role": "robot", "content": "x"}])), "role 'robot'"),
        (json.dumps(line("b", images=[], prompt=[])), "prompt must be"),
        (json.dumps(line("b", images=[], prompt="\ud800")), "no Unicode text"),
        (json.dumps(line("b", images=[], answer=float("nan"))), "NaN is no JSON number"),
        (json.dumps(line("b", images=[], meta=3)), "meta must be an object"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_left(tmp_path, bad, words):
    jsonl, images = write_source(tmp_path, [line("a")])
    (images / "text.png").write_text("no image")
    (tmp_path / "outside.png").write_bytes(png(0))
    (images / "link.png").symlink_to(tmp_path / "outside.png")
    jsonl.write_text(jsonl.read_text() + "\n" + bad + "\n")  # the blank line counts: the bad one is line 3
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(DataError) as error:
        prepare(jsonl, images, tmp_path / "out", 2)
    assert f"{jsonl}:3: " in str(error.value)
    assert words in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_gold_answers_go_through_the_injected_check(tmp_path):
    seen = []

    def check(task, answer):
        seen.append((task, answer))
        if answer == "many":
            raise ConfigError(f"gold answer {answer!r} is no integer")

    with pytest.raises(DataError, match=r"data\.jsonl:2: gold answer 'many' is no integer"):
        _prepare(tmp_path, [line("a"), line("b", answer="many"), line("c")], check=check)
    assert seen == [("count", "1"), ("count", "many")]


def test_refuses_wrong_folders_and_sizes(tmp_path):
    jsonl, images = write_source(tmp_path, [line("a")])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "empty.jsonl").touch()
    for arguments, words in [
        ((jsonl, images, tmp_path / "full", 1), "is not empty"),
        ((jsonl, images, tmp_path / "out", 0), "1 or more"),
        ((tmp_path / "no.jsonl", images, tmp_path / "out", 1), "no such file"),
        ((jsonl, tmp_path / "no", tmp_path / "out", 1), "no such folder"),
        ((tmp_path / "empty.jsonl", images, tmp_path / "out", 1), "holds no samples"),
    ]:
        with pytest.raises(DataError, match=words):
            prepare(*arguments)
    assert not (tmp_path / "out").exists()


def _load(folder: Path) -> manifests.Manifest:
    return manifests.load(open_store(folder))[0]


def _edit(folder: Path, change) -> None:
    raw = json.loads((folder / "manifest.json").read_text())
    change(raw)
    (folder / "manifest.json").write_text(json.dumps(raw))


def test_folders_that_are_not_shards_say_how_to_make_them(tmp_path):
    folder = make_shards(tmp_path, {"count": 3})
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "a.tar").write_bytes((folder / "train-000000.tar").read_bytes())
    for path, words in [(tmp_path / "nowhere", "there is nothing at"), (foreign, "1 tar files but no manifest")]:
        with pytest.raises(DataError, match=words) as error:
            _load(path)
        assert "megatron-vlrl data prepare" in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw.update(version=2), "version 2, this program reads 1"),
        (lambda raw: raw.pop("version"), "not a manifest"),
        (lambda raw: raw.pop("shards"), "damaged"),
        (lambda raw: raw.update(shards=[]), "holds no samples"),
        (lambda raw: raw["shards"][0].update(name="../train-000000.tar"), "not a plain file name"),
        (lambda raw: raw["shards"][0].update(size=5), "manifest.json says 5"),
        (lambda raw: raw["shards"][0].update(name="train-000009.tar"), "is missing"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, change, words):
    folder = make_shards(tmp_path, {"count": 3})
    _edit(folder, change)
    with pytest.raises(DataError, match=words):
        _load(folder)


def test_a_shard_cut_short_is_seen_on_load_and_a_flipped_bit_by_verify(tmp_path):
    folder = make_shards(tmp_path, {"count": 9})
    shard = folder / "train-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    with pytest.raises(DataError, match=r"train-000001\.tar has 9728 bytes where .* 10240"):
        _load(folder)
    shard.write_bytes(whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
    _load(folder)
    with pytest.raises(DataError, match=r"SHA-256 differs for train-000001\.tar;"):
        manifests.verify(open_store(folder))


def test_an_index_of_other_shards_is_refused(tmp_path):
    folder = make_shards(tmp_path / "a", {"count": 9})
    other = make_shards(tmp_path / "b", {"read": 4, "count": 5})
    index = folder / "index.npz"
    index.write_bytes((other / "index.npz").read_bytes())
    _edit(folder, lambda raw: raw["index"].update(size=index.stat().st_size))
    with pytest.raises(DataError, match=r"index\.npz is not the file"):
        manifests.load_index(open_store(folder), _load(folder))
    _edit(folder, lambda raw: raw["index"].update(sha256=manifests.sha256_file(index)))
    with pytest.raises(DataError, match="does not agree"):
        manifests.load_index(open_store(folder), _load(folder))


def test_an_index_cannot_hide_pickled_objects(tmp_path):
    folder = make_shards(tmp_path, {"count": 2})
    index = folder / "index.npz"
    np.savez(index, **dict.fromkeys(("task", "shard", "offset", "size", "key_end", "keys"), np.array([{}, {}])))
    new = {"size": index.stat().st_size, "sha256": manifests.sha256_file(index)}
    _edit(folder, lambda raw: raw["index"].update(new))
    with pytest.raises(DataError, match="cannot be read as an index"):
        manifests.load_index(open_store(folder), _load(folder))
