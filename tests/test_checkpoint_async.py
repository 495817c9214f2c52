"""Checkpoints written while training goes on: what they hold, when they count, and that a kill loses none."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vlrl.backends import Backend
from megatron_vlrl.backends.megatron.state import _Results
from megatron_vlrl.checkpoint.manifest import Manifest
from megatron_vlrl.checkpoint.store import CheckpointStore
from megatron_vlrl.errors import CheckpointError
from megatron_vlrl.parallel.collectives import world_group
from megatron_vlrl.parallel.groups import Group
from tests.run_folder import Inputs, folder_bytes, inputs, records, run, train, write_config  # noqa: F401 - a fixture
from tests.spawn import PRELOAD, _rank_main, run_ranks
from tests.test_backend_state import load, make, observed, step
from tests.tiny import make_tiny


class Later:
    """A Saving that is done when it is told to be, or waited for."""

    def __init__(self, folder: Path, problem: str = "") -> None:
        self.folder, self.problem, self.done, self.asked = folder, problem, False, 0

    def finished(self, *, wait: bool) -> bool:
        self.asked += 1
        if not (self.done or wait):
            return False
        if self.problem:
            raise CheckpointError(self.problem)
        (self.folder / "shard").write_bytes(b"written late")
        return True


class Store:
    """A store whose saves are all `Later`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = CheckpointStore(folder, keep=2, world=Group.single())
        self.begun: list[Later] = []

    def save(self, number: int, problem: str = "") -> Path | None:
        def write(folder: Path) -> Later:
            self.begun.append(Later(folder, problem))
            return self.begun[-1]

        return self.store.save(number, write, layout={})

    def steps(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("step-*"))


def poll_until_committed(store: CheckpointStore) -> Path:
    """As a training loop does, step by step."""
    while True:
        path = store.poll()
        if path is not None:
            return path
        time.sleep(0.01)


def test_a_checkpoint_counts_when_it_is_written(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.store.poll() is None
    assert store.save(1) is None
    for _ in range(3):
        assert store.store.poll() is None
    assert store.steps() == []
    assert store.store.find("auto") is None
    store = Store(tmp_path)
    store.save(2)
    store.begun[0].done = True
    assert poll_until_committed(store.store) == tmp_path / "step-00000002"
    assert store.begun[0].asked == 1
    assert store.store.find("auto") == tmp_path / "step-00000002"
    assert set(Manifest.read(tmp_path / "step-00000002").files) == {"shard"}
    assert store.store.poll(wait=True) is None


def test_the_next_save_and_the_end_wait_for_what_is_being_written(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in (1, 2, 3):
        assert store.save(number) is None
        assert store.steps() == [f"step-{number:08d}" for number in range(max(1, number - 2), number)]
    assert store.store.poll(wait=True) == tmp_path / "step-00000003"
    assert store.store.take_blocked_seconds() > 0
    assert store.store.take_blocked_seconds() == 0


def test_what_could_not_be_written_leaves_the_earlier_ones(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(1)
    store.store.poll(wait=True)
    store.save(2, problem="no space left")
    with pytest.raises(CheckpointError, match=r"step 2 could not be written.*no space left; earlier"):
        store.store.poll(wait=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    store.save(3)
    assert store.store.poll(wait=True) == tmp_path / "step-00000003"


def test_a_writer_hands_over_one_value_of_any_size_or_none() -> None:
    """More than a pipe holds: nobody reads before the writer has ended."""
    small, large = {0: ["one"]}, {0: [os.urandom(1000) for _ in range(500)]}

    def in_a_writer(work: Callable[[_Results], object]) -> _Results:
        results = _Results()
        child = os.fork()
        if child == 0:
            work(results)
            os._exit(0)
        os.waitpid(child, 0)
        return results

    for value in (small, large):
        assert in_a_writer(lambda results, value=value: results.put(value)).get_nowait() == value
    for end in (0, 100, 400_000):  # killed before all was written
        with pytest.raises(queue.Empty):
            in_a_writer(
                lambda results, end=end: os.write(results._file.fileno(), pickle.dumps(large)[:end])
            ).get_nowait()


def save_and_train_on(folder: Path, checkpoints: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """Two steps, an asynchronous save, and two more steps while it is written; what the save should hold."""
    backend = make(folder, layout)
    for _ in range(2):
        step(folder, backend)
    store = CheckpointStore(checkpoints, keep=2, world=world_group())
    assert store.save(2, lambda part: backend.save(part, asynchronous=True), layout={}) is None
    result = observed(folder, backend)
    blocked = store.take_blocked_seconds()
    assert store.poll(wait=True) == checkpoints / "step-00000002"
    backend.close()
    return result | {"blocked": blocked}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"data": 2, "distributed": True, "overlap": True}], ids=str)
@pytest.mark.slow
def test_it_holds_the_state_of_its_step(layout: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    saved = run_ranks(save_and_train_on, 2, folder, tmp_path, layout)
    loaded = run_ranks(load, 2, folder, tmp_path / "step-00000002", layout)
    for then, now in zip(saved, loaded, strict=True):
        assert then["settings"] == now["settings"]
        assert then["loss"] == now["loss"]
        assert set(then["slices"]) == set(now["slices"])
        for name, (start, values) in then["slices"].items():
            assert start == now["slices"][name][0]
            assert (values == now["slices"][name][1]).all(), name


def save_and_hang(folder: Path, checkpoints: Path) -> None:
    """A good checkpoint, then one whose writers never end, and a rank that trains on for ever."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as mcore_writer

    def hang(*_args: Any, **_kwargs: Any) -> None:
        note(checkpoints / "writers", os.getpid())
        time.sleep(3600)

    backend: Backend = make(folder, {})
    store = CheckpointStore(checkpoints, keep=2, world=world_group())
    store.save(1, lambda part: backend.save(part, asynchronous=True), layout={})
    assert store.poll(wait=True)
    mcore_writer.FileSystemWriterAsync.write_preloaded_data = staticmethod(hang)
    store.save(2, lambda part: backend.save(part, asynchronous=True), layout={})
    note(checkpoints / "ranks", os.getpid())
    while True:
        step(folder, backend)
        store.poll()


def note(path: Path, pid: int) -> None:
    with path.open("a") as stream:
        stream.write(f"{pid} {parent_of(pid)}\n")


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def wait_until(what: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_goes_on_from_what_was_written_meanwhile(inputs: Inputs, tmp_path: Path) -> None:  # noqa: F811
    """Sharded optimizer and overlapped communication as well, on two data ranks."""
    config = write_config(
        tmp_path / "run.yaml",
        inputs,
        run={"folder": str(tmp_path / "run"), "resume": "auto"},
        parallel={"data": 2, "overlap": True},
        optimizer={"distributed": True},
        checkpoint={"every": 1, "keep": 3, "asynchronous": True},
    )
    run(train(config), 2, tmp_path / "logs").ok()
    folder = tmp_path / "run"
    assert [path.name for path in sorted((folder / "checkpoints").glob("step-*"))] == [
        f"step-{number:08d}" for number in (1, 2, 3)
    ]
    whole, weights = records(folder), folder_bytes(folder / "hf")
    assert [record["step"] for record in whole] == [1, 2, 3]
    shutil.rmtree(folder / "checkpoints/step-00000003")
    run(train(config), 2, tmp_path / "logs").ok()
    assert records(folder) == whole
    assert folder_bytes(folder / "hf") == weights


def test_a_killed_rank_takes_its_writers_along_and_leaves_the_last_good_one(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    logs = tmp_path / "logs"
    logs.mkdir()
    rank = context.Process(target=_rank_main, args=(save_and_hang, (folder, tmp_path), 0, 1, str(logs)))
    rank.start()
    try:
        wait_until(lambda: not rank.is_alive() or ((tmp_path / "ranks").exists() and (tmp_path / "writers").exists()))
        assert rank.is_alive(), (logs / "rank0.log").read_text()
        lines = (tmp_path / "writers").read_text().split("\n")[:-1]
        processes = {int(pid) for line in lines for pid in line.split()}
        assert len(processes) >= 2  # those who write, and the one that started them
        assert all(is_running(pid) for pid in processes)
        assert any(path.name.startswith(".tmp-00000002") for path in tmp_path.iterdir())
    finally:
        os.kill(rank.pid, signal.SIGKILL)
        rank.join()
    wait_until(lambda: not any(is_running(pid) for pid in processes))
    found = CheckpointStore(tmp_path, keep=2, world=Group.single()).find("auto")
    assert found == tmp_path / "step-00000001"
    assert not any(path.name.startswith(".tmp-") for path in tmp_path.iterdir())
