"""Whole runs for tests: a tiny model and shards of digits on disk, and ways to start the program on them.

`cli` starts a command as a user does. `Ranks` starts its processes as torchrun would, but as forks of a server that
has torch and megatron-core imported: the same program, seconds faster.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_vlrl.algorithms.losses import LOSSES
from megatron_vlrl.cli import main
from tests.spawn import PRELOAD
from tests.tiny import make_tiny

REPOSITORY = Path(__file__).parents[1]
TASKS = ("count", "read", "box", "sum", "pick")
TIMED = ("time", "seconds/")  # what two equal runs may differ in
PAUSE_FILE, PAUSE_AT = "VLRL_TEST_PAUSE_FILE", "VLRL_TEST_PAUSE_AT"


@dataclass(frozen=True)
class Inputs:
    """What runs read: a model, shards to train on and held-out ones, and the raw data they were made of."""

    root: Path

    model = property(lambda self: self.root / "model")
    train = property(lambda self: self.root / "shards/train")
    heldout = property(lambda self: self.root / "shards/heldout")
    raw = property(lambda self: self.root / "raw")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Made once a session, however many test modules import this fixture."""
    made = Inputs(tmp_path_factory.getbasetemp() / "run-inputs")
    if not made.root.exists():
        from examples.quickstart.make_digits import main as make_digits

        make_tiny(made.model)
        make_digits(["--out", str(made.raw), "--train", "40", "--held-out", "2", "--seed", "0"])
        prepare(made.raw / "train.jsonl", made.raw / "images", made.train)
        prepare(made.raw / "heldout.jsonl", made.raw / "images", made.heldout)
    return made


def prepare(jsonl: Path, images: Path, out: Path) -> None:
    """`megatron-vlrl data prepare`."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["data", "prepare", "--jsonl", str(jsonl), "--images", str(images), "--out", str(out)]) == 0


def write_config(path: Path, inputs: Inputs, **sections: Mapping[str, Any]) -> Path:
    """A small RL run under path's folder / "run". A random model is never right: length in characters is rewarded."""
    settings: dict[str, dict[str, Any]] = {
        "run": {"folder": str(path.parent / "run")},
        "model": {"path": str(inputs.model)},
        "data": {"train": str(inputs.train), "prompts_per_step": 10},
        "rollout": {"samples_per_prompt": 4, "max_new_tokens": 8},
        "reward": {
            "length_weight": 0.5,
            "length_unit": "char",
            "length_bands": {task: [0, 40, 50, 90] for task in TASKS},
        },
        "optimizer": {"lr": 1.0e-3},
        "train": {"steps": 3},
        "evaluate": {"data": str(inputs.heldout), "per_task": 2},
        "observe": {"rollouts_every": 1, "rollouts_kept": 100},
    }
    for name, values in sections.items():
        settings[name] = {**settings.get(name, {}), **values}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings))
    return path


def train(config: Path, *overrides: str) -> list[str]:
    """The arguments of a training run."""
    return ["train", "--config", str(config), *overrides]


@dataclass(frozen=True)
class Ended:
    """How a command ended. codes: of each process it was started as. out: rank 0's stdout. err: everyone's stderr."""

    codes: list[int]
    out: str
    err: str

    def ok(self) -> Ended:
        """Fail the test with all that was said unless every process ended well."""
        assert self.codes == [0] * len(self.codes), f"{self.codes}\n{self.out}\n{self.err}"
        return self


def cli(argv: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """`python -m megatron_vlrl ...` in the repository; `ended` waits for it."""
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_vlrl", *argv],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ended(process: subprocess.Popen[str], timeout: float = 150.0) -> Ended:
    """Wait for a command; it is killed, and the test fails, if that takes too long."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout} s\n{out}\n{err}") from None
    return Ended([process.returncode], out, err)


class Ranks:
    """`megatron-vlrl ...` as `size` processes with torchrun's variables (none for one process)."""

    def __init__(self, argv: Sequence[str], size: int, logs: Path, **environment: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
        self._logs = logs
        self.processes = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(size):
            env = {**environment, "GLOO_SOCKET_IFNAME": "lo"}
            if size > 1:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            process = context.Process(target=_rank_main, args=(list(argv), env, rank, logs))
            process.start()
            self.processes.append(process)

    def kill(self) -> None:
        """SIGKILL to all, at once."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def ended(self, timeout: float = 120.0) -> Ended:
        """Wait; once one has failed the others get ten seconds, and are then killed."""
        deadline = time.monotonic() + timeout
        while any(p.is_alive() for p in self.processes) and time.monotonic() < deadline:
            if any(p.exitcode not in (None, 0) for p in self.processes):
                deadline = min(deadline, time.monotonic() + 10)
            time.sleep(0.02)
        late = any(p.is_alive() for p in self.processes) and all(p.exitcode in (None, 0) for p in self.processes)
        self.kill()
        out = (self._logs / "out-0").read_text()
        err = "".join((self._logs / f"err-{rank}").read_text() for rank in range(len(self.processes)))
        assert not late, f"still running after {timeout} s\n{out}\n{err}"
        return Ended([int(p.exitcode or 0) for p in self.processes], out, err)


def _rank_main(argv: list[str], environment: dict[str, str], rank: int, logs: Path) -> None:
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        with open(logs / f"{name}-{rank}", "w") as file:
            os.dup2(file.fileno(), number)
    sys.exit(main(argv))


def run(argv: Sequence[str], size: int, logs: Path) -> Ended:
    """Start as many ranks and wait for them."""
    return Ranks(argv, size, logs).ended()


def wait_for(condition: Callable[[], bool], alive: Callable[[], bool], seconds: float = 120.0) -> None:
    """Until `condition` holds; fails when what should bring it about has ended, or time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert alive(), "it ended before"
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's file without what may differ between equal runs."""
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(TIMED)} for line in lines]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], *, relative: float, absolute: float
) -> dict[str, Any]:
    """Metrics of two records that are further apart than allowed."""
    assert set(ours) == set(theirs)
    return {
        name: (ours[name], theirs[name])
        for name in ours
        if ours[name] != theirs[name]
        and not (
            isinstance(ours[name], float) and ours[name] == pytest.approx(theirs[name], rel=relative, abs=absolute)
        )
    }


@functools.cache
def _calls() -> Iterator[int]:
    return iter(range(1, sys.maxsize))


def pausing_ppo(*args: Any, **kwargs: Any) -> Any:
    """`algorithm.loss.kind` for runs that are to be killed: ppo_clip, but for ever in its PAUSE_AT-th call if asked."""
    if PAUSE_FILE in os.environ and next(_calls()) == int(os.environ[PAUSE_AT]):
        Path(f"{os.environ[PAUSE_FILE]}-{os.environ.get('RANK', '0')}").touch()
        time.sleep(600)
    return LOSSES["ppo_clip"](*args, **kwargs)
