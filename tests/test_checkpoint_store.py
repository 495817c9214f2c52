"""The checkpoint folder: what a kill, a bad disk or a full one may never take away."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_vlrl.checkpoint.manifest import MANIFEST_NAME, Manifest
from megatron_vlrl.checkpoint.store import CheckpointStore
from megatron_vlrl.errors import CheckpointError, ConfigError
from megatron_vlrl.parallel.groups import Group
from tests.spawn import run_ranks

FILES = ("common.pt", "weights/rank0.bin", "weights/deep/rank1.bin", "empty")


def content(name: str, step: int) -> bytes:
    if name == "empty":
        return b""
    return np.random.default_rng([step, *name.encode()]).bytes(700)


def writer(step: int):
    def write(folder: Path) -> None:
        for name in FILES:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content(name, step))

    return write


def is_whole(folder: Path) -> bool:
    """Judged by the content that was to be written, not by the store's own manifest."""
    step = int(folder.name.split("-")[1])
    return all((folder / name).read_bytes() == content(name, step) for name in FILES)


def make_store(folder: Path, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(folder, keep=keep, world=Group.single())


def save(folder: Path, *steps: int, keep: int = 2) -> CheckpointStore:
    store = make_store(folder, keep)
    for step in steps:
        store.save(step, writer(step), layout={"tensor": 2})
    return store


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_killed_at(operation: int, folder: Path, step: int) -> bool:
    """Save `step` in a forked child that is killed before its n-th file operation under `folder`; whether it was."""
    child = os.fork()
    if child == 0:
        seen = 0

        def kill_at(event: str, args: tuple) -> None:
            nonlocal seen
            if event in (
                "open",
                "os.mkdir",
                "os.rename",
                "os.remove",
                "os.rmdir",
                "os.listdir",
                "os.scandir",
                "shutil.rmtree",
            ):
                path = args[0]
                if isinstance(path, int) or str(folder) in str(path):
                    if seen == operation:
                        os.kill(os.getpid(), signal.SIGKILL)
                    seen += 1

        sys.addaudithook(kill_at)
        try:
            save(folder, step, keep=1)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.mark.parametrize("step", [3, 2], ids=["next step", "same step again"])
def test_a_kill_before_any_file_operation_leaves_a_whole_checkpoint(tmp_path, step):
    """keep=1, so that a wrong order of commit and delete would lose everything."""
    found = []
    for operation in range(1000):
        folder = tmp_path / str(operation)
        save(folder, 2, keep=1)
        killed = run_killed_at(operation, folder, step)
        resumed = make_store(folder, keep=1).find("auto")
        assert resumed is not None
        assert is_whole(resumed)
        assert not any(name.startswith(".tmp-") for name in names(folder))
        found.append(Manifest.read(resumed).sequence)
        save(folder, 4, keep=1)
        assert [name for name in names(folder) if not name.startswith(".")] == ["latest", "step-00000004"]
        if not killed:
            break
    assert not killed
    assert found == sorted(found)  # once committed, always there
    assert set(found) == {1, 2}
    assert len(found) > 30


def test_find_gives_what_was_saved_last(tmp_path):
    assert make_store(tmp_path / "none").find("auto") is None
    store = save(tmp_path, 1, 5)
    assert make_store(tmp_path / "none").find("never") is None
    converted = save(tmp_path / "converted", 0).find("auto")
    assert converted is not None
    assert make_store(tmp_path / "none").find(converted) == converted
    for start in ("never", converted):
        with pytest.raises(ConfigError, match=rf"run\.resume={start} .*step-00000005.*run\.resume=auto"):
            store.find(start)
    assert store.find("auto") == tmp_path / "step-00000005"
    assert store.find(str(tmp_path / "step-00000001")) == tmp_path / "step-00000001"
    assert (tmp_path / "latest").read_text() == "step-00000005\n"
    manifest = Manifest.read(tmp_path / "step-00000005")
    assert (manifest.step, manifest.layout) == (5, {"tensor": 2})
    assert set(manifest.files) == set(FILES)


def test_a_run_that_went_back_resumes_where_it_was_last(tmp_path):
    store = save(tmp_path, 5, 10, 15, keep=3)
    store.save(10, writer(10), layout={})
    assert store.find("auto") == tmp_path / "step-00000010"
    store.save(11, writer(11), layout={})
    assert [name for name in names(tmp_path) if name.startswith("step")] == [
        "step-00000010",
        "step-00000011",
        "step-00000015",
    ]


def test_retention_leaves_foreign_files_alone(tmp_path):
    foreign = ["notes.txt", ".tmp-mine", "step-final", "step-1", "replaced-by-me"]
    (tmp_path / "notes.txt").write_text("keep me")
    for name in foreign[1:]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("keep me")
    store = save(tmp_path, 1, 2, 3, 4)
    (tmp_path / ".tmp-00000009-0123abcd").mkdir()
    (tmp_path / ".tmp-00000009-0123abcd" / "half").write_bytes(b"x")
    assert store.find("auto") == tmp_path / "step-00000004"
    assert names(tmp_path) == sorted([*foreign, "latest", "step-00000003", "step-00000004"])
    assert (tmp_path / "step-1" / "x").read_text() == "keep me"


def flip(path: Path, random: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    data[random.integers(len(data))] ^= 1 << int(random.integers(8))
    path.write_bytes(data)


def truncate(path: Path, random: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes()[: random.integers(path.stat().st_size)])


def append(path: Path, random: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes() + random.bytes(1 + random.integers(9)))


def remove(path: Path, random: np.random.Generator) -> None:
    path.unlink()


def become_folder(path: Path, random: np.random.Generator) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [flip, truncate, append, remove, become_folder])
def test_any_damage_to_any_file_is_found_and_the_one_before_taken(tmp_path, damage, caplog):
    store = save(tmp_path, 1, 2)
    newest = tmp_path / "step-00000002"
    random = np.random.default_rng(0)
    targets = [name for name in (*FILES, MANIFEST_NAME) if name != "empty" or damage not in (flip, truncate)]
    for name in targets * (20 if damage is flip else 1):
        path = newest / name
        before = path.read_bytes()
        damage(path, random)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert store.find("auto") == tmp_path / "step-00000001"
        assert str(newest) in caplog.text
        assert name in caplog.text
        with pytest.raises(CheckpointError, match=r"step-00000002.*run.resume=auto"):
            store.find(newest)
        if path.is_dir():
            path.rmdir()
        path.write_bytes(before)
    assert store.find("auto") == newest


def test_only_damaged_ones_is_an_error_and_not_a_fresh_start(tmp_path):
    store = save(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"step-0000000{step}" / "common.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints.*run.resume=never"):
        store.find("auto")


def test_a_manifest_that_leaves_its_folder_is_refused(tmp_path):
    store = save(tmp_path, 1)
    folder = tmp_path / "step-00000001"
    manifest = Manifest.read(folder)
    record = manifest.files["common.pt"]
    for name in ("../step-00000001/common.pt", str(folder / "common.pt")):
        Manifest(step=1, sequence=1, layout={}, files={name: record}).write(folder)
        with pytest.raises(CheckpointError, match="outside its folder"):
            store.find(folder)


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere.*No such file"):
        make_store(tmp_path).find(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"checkpoint.keep is 0"):
        make_store(tmp_path, keep=0)


def full_disk_on_one_rank(folder: str, failing: int) -> list[str]:
    import torch.distributed as dist

    rank = dist.get_rank()
    store = CheckpointStore(Path(folder), keep=2, world=Group(rank, 2, dist.group.WORLD))

    def write(step: int, part: Path, fail: bool) -> None:
        for name in FILES[rank::2]:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_bytes(content(name, step))
            if fail:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part / name))

    store.save(1, lambda part: write(1, part, False), layout={"data": 2})
    with pytest.raises(CheckpointError) as error:
        store.save(2, lambda part: write(2, part, rank == failing), layout={"data": 2})
    after_failure = sorted(os.listdir(folder))
    found = store.find("auto")
    store.save(3, lambda part: write(3, part, False), layout={"data": 2})
    last = store.find("auto")
    assert last is not None
    (last / "common.pt").touch()
    dist.barrier()
    if rank == failing:
        (last / "weights/rank0.bin").write_bytes(b"damaged")
    dist.barrier()
    return [str(error.value), *after_failure, str(found), str(last), str(store.find("auto"))]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_on_one_of_two_ranks_fails_both_and_loses_nothing(tmp_path, failing):
    results = run_ranks(full_disk_on_one_rank, 2, str(tmp_path), failing)
    assert results[0] == results[1]
    message, *listing, found, last, after_damage = results[0]
    assert f"rank {failing}: [Errno 28] No space left on device" in message
    assert "step 2" in message
    assert "Free space" in message
    assert listing == ["latest", "step-00000001"]
    assert found == after_damage == str(tmp_path / "step-00000001")
    assert last == str(tmp_path / "step-00000003")
    assert is_whole(tmp_path / "step-00000001")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"no disk of one megabyte can be made: {error}")
    if result.returncode:
        pytest.skip(f"no disk of one megabyte can be made: {' '.join(command)}: {result.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def write_large(folder: Path) -> None:
    (folder / "shard").write_bytes(bytes(600_000))


def write_too_much(folder: Path) -> None:
    (folder / "shard").write_bytes(bytes(2_000_000))


def write_to_the_last_byte(folder: Path) -> None:
    """Succeeds, and leaves no room for the manifest."""
    with (folder / "shard").open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while stream.write(bytes(4096)):
            pass


@pytest.mark.parametrize("write", [write_too_much, write_to_the_last_byte])
def test_a_disk_that_is_really_full(small_disk, write):
    store = save(small_disk, 1, keep=1)
    with pytest.raises(CheckpointError, match=r"step 2 .*No space left on device"):
        store.save(2, write, layout={})
    assert names(small_disk) == ["latest", "step-00000001"]
    assert store.find("auto") == small_disk / "step-00000001"
    assert is_whole(small_disk / "step-00000001")
    store.save(2, writer(2), layout={})
    assert names(small_disk) == ["latest", "step-00000002"]


def test_a_disk_without_room_for_another_is_refused_before_anything_is_written(small_disk):
    store = make_store(small_disk, keep=1)
    store.save(1, write_large, layout={})
    with pytest.raises(
        CheckpointError, match=r"No space left on device: \d+ bytes free, the last checkpoint took 608192"
    ):
        store.save(2, lambda folder: pytest.fail("nothing may be written"), layout={})
    assert names(small_disk) == ["latest", "step-00000001"]
