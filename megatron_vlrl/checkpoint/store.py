"""A folder of checkpoints: saved all or nothing, verified before use, the oldest removed.

In: a function that writes this rank's shards into a given folder. Out: `step-00000012/` with a MANIFEST.json, and the
folder to resume from. What is inside a checkpoint is the backend's business. Every rank must see the same folder.

Names in the folder: `step-*` finished; `.tmp-*` unfinished or being deleted; `replaced-*` a finished one that is being
saved anew; `latest` names the newest, for people. Everything else is left alone.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlrl.backends.protocol import Saving
from megatron_vlrl.checkpoint.files import discard, flush, flush_folders, list_files, write_text
from megatron_vlrl.checkpoint.manifest import FileRecord, Manifest, check_file, describe_file
from megatron_vlrl.errors import CheckpointError, ConfigError
from megatron_vlrl.parallel.collectives import agree, gather_objects
from megatron_vlrl.parallel.groups import Group

LOG = logging.getLogger(__name__)

_FINISHED = re.compile(r"(step-\d{8}|replaced-\d{8}-[0-9a-f]{8})")
_BLOCK = 4096  # bytes; a file takes up to one block more than its length
_UNFINISHED = re.compile(r"\.tmp-\d{8}-[0-9a-f]{8}")
# What a full or failing disk looks like: Python's files, torch's zip writer (RuntimeError), a backend's own wording.
_WRITE_ERRORS = (OSError, RuntimeError, CheckpointError)


@dataclass(slots=True)
class _Unfinished:
    """A checkpoint on its way: saving is None when it is written, hashes None until then. began, blocked: seconds."""

    step: int
    layout: Mapping[str, Any]
    token: str
    part: Path
    sequence: int = 0
    saving: Saving | None = None
    hashes: Future[dict[str, FileRecord]] | None = None
    began: float = field(default_factory=time.perf_counter)
    blocked: float = 0.0

    def write(self, write: Callable[[Path], Saving | None]) -> None:
        """Call it, and keep what it began."""
        self.saving = write(self.part)


class CheckpointStore:
    """The checkpoints of one run. `save` and `find` are collective over `world`; rank 0 names, commits and deletes."""

    def __init__(self, folder: Path, *, keep: int, world: Group) -> None:
        """folder: made at the first save. keep: finished checkpoints that stay, 1 or more."""
        if keep < 1:
            raise ConfigError(f"checkpoint.keep is {keep}; keep 1 or more, or the run could not be resumed")
        self.folder = Path(folder)
        self.keep = keep
        self.world = world
        self._unfinished: _Unfinished | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._blocked = 0.0  # seconds

    def save(self, step: int, write: Callable[[Path], Saving | None], *, layout: Mapping[str, Any]) -> Path | None:
        """Call `write(folder)` on every rank, then make what it wrote the newest checkpoint; return its folder.

        Where `write` returns a Saving, return None at once: a later `poll` makes it the newest. One that is still being
        written is waited for first. `write` may raise OSError, RuntimeError or CheckpointError on any rank, but must
        not leave the others waiting inside it. Then every rank raises CheckpointError, and the folder is as it was
        before. layout: JSON-like, how the run is spread; it goes into the manifest.
        """
        self.poll(wait=True)
        token = gather_objects(secrets.token_hex(4), self.world)[0]  # a late writer of a dead run never meets ours
        new = _Unfinished(step, layout, token, self.folder / f".tmp-{step:08d}-{token}")
        with self._stopwatch(new), self._or_discard(new):
            new.sequence = self._on_main(lambda: self._begin(new.part))
            self._on_all(lambda: new.write(write))
        self._unfinished = new
        return self.poll(wait=True) if new.saving is None else None

    def poll(self, *, wait: bool = False) -> Path | None:
        """Bring a checkpoint that is being written one stage on: written, hashed, then the newest (returned).

        Cheap where there is nothing to do; wait: until there is nothing more to do. Errors as `save`.
        """
        new = self._unfinished
        if new is None:
            return None
        self._unfinished = None
        with self._stopwatch(new):
            with self._or_discard(new):
                final = self._advance(new, wait=wait)
            if final is not None:
                self._on_main(lambda: self._tidy(final, new.token))
        if final is None:
            self._unfinished = new
        elif self.world.rank == 0:
            seconds = time.perf_counter() - new.began
            LOG.info("%s took %.2f s to save, for %.2f s of which training stood still", final, seconds, new.blocked)
        return final

    def take_blocked_seconds(self) -> float:
        """How long saving has kept the caller since this was last asked."""
        seconds, self._blocked = self._blocked, 0.0
        return seconds

    @contextmanager
    def _stopwatch(self, new: _Unfinished) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        new.blocked += seconds
        self._blocked += seconds

    @contextmanager
    def _or_discard(self, new: _Unfinished) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            self._on_main(lambda: shutil.rmtree(new.part, ignore_errors=True))
            raise CheckpointError(
                f"the checkpoint of step {new.step} could not be written to {self.folder}: {error}; earlier "
                "checkpoints are untouched. Free space on that disk, lower checkpoint.keep, or set run.folder to "
                "another one"
            ) from error

    def _advance(self, new: _Unfinished, *, wait: bool) -> Path | None:
        """The new checkpoint's folder if this made it the newest."""
        if new.saving is not None:
            if not all(self._on_all(lambda: new.saving is None or new.saving.finished(wait=wait))):
                return None
            new.saving = None
        if new.hashes is None:
            new.hashes = self._start_hashing(new.part)
        if not wait and not agree(new.hashes.done(), self.world):
            return None
        files = {name: record for records in self._on_all(new.hashes.result) for name, record in records.items()}
        manifest = Manifest(step=new.step, sequence=new.sequence, layout=new.layout, files=files)
        final: Path = self._on_main(lambda: self._commit(new.part, manifest, new.token))
        return final

    def find(self, spec: str | Path) -> Path | None:
        """The checkpoint to resume from, every file of it verified, the same on every rank.

        spec: "never" gives None; ConfigError if the folder holds a run already, which a crash of the new one would
        resume. "auto" the newest undamaged one of the folder, None if it holds none; anything else is a
        checkpoint's folder, and one of step 0 starts a new run as "never" does. CheckpointError if that one is damaged,
        or if "auto" finds damaged ones only.
        """
        if spec == "never":
            self._refuse_older_run(spec)
            return None
        if spec != "auto":
            problems = self._problems(Path(spec))
            if problems:
                raise CheckpointError(
                    f"run.resume={spec}: {'; '.join(problems)}. Name another step-* folder, or use run.resume=auto"
                )
            if self._on_main(lambda: Manifest.read(Path(spec))).step == 0:
                self._refuse_older_run(spec)
            return Path(spec)
        candidates: list[Path] = self._on_main(self._clean_and_list)
        for path in candidates:
            problems = self._problems(path)
            if not problems:
                return path
            if self.world.rank == 0:
                LOG.warning("checkpoint %s is damaged and passed over: %s", path, "; ".join(problems))
        if candidates:
            raise CheckpointError(
                f"none of the {len(candidates)} checkpoints in {self.folder} is undamaged (see the log); "
                "restore one of them, or start anew with run.resume=never and another run.folder"
            )
        return None

    def _on_all(self, work: Callable[[], Any]) -> list[Any]:
        """Every rank's result, on every rank; CheckpointError on all of them if one rank's work failed."""
        value, problem = None, None
        try:
            value = work()
        except _WRITE_ERRORS as error:
            problem = f"rank {self.world.rank}: {error}"
        outcomes = gather_objects((value, problem), self.world)
        problems = [problem for _, problem in outcomes if problem]
        if problems:
            raise CheckpointError("; ".join(problems))
        return [value for value, _ in outcomes]

    def _on_main(self, work: Callable[[], Any]) -> Any:
        return self._on_all(lambda: work() if self.world.rank == 0 else None)[0]

    def _mine(self, sizes: Mapping[str, int]) -> list[str]:
        """This rank's share of the files: every rank gets big ones and small ones."""
        return sorted(sizes, key=lambda name: (-sizes[name], name))[self.world.rank :: self.world.size]

    def _begin(self, part: Path) -> int:
        """Make the folder and return the new sequence number.

        A disk that could not hold a checkpoint like the last one is refused at once: megatron-core hangs until the
        collectives' timeout where the one file that rank 0 writes alone is the first that does not fit.
        """
        part.mkdir(parents=True)
        earlier = [manifest for manifest, _ in self._finished() if manifest]
        if not earlier:
            return 1
        last = max(earlier, key=lambda manifest: manifest.sequence)
        needed = sum(record.size + _BLOCK for record in last.files.values()) + _BLOCK  # and the manifest
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {free} bytes free, the last checkpoint took {needed}"
            )
        return last.sequence + 1

    def _start_hashing(self, part: Path) -> Future[dict[str, FileRecord]]:
        """Flush and hash what all ranks wrote, each rank a share, in a thread of its own."""
        sizes: dict[str, int] = self._on_main(lambda: {name: (part / name).stat().st_size for name in list_files(part)})

        def share() -> dict[str, FileRecord]:
            for name in self._mine(sizes):
                flush(part / name)
            return {name: describe_file(part, name) for name in self._mine(sizes)}

        return self._thread.submit(share)

    def _commit(self, part: Path, manifest: Manifest, token: str) -> Path:
        """From here a crash leaves either the old newest checkpoint or the new one."""
        manifest.write(part)
        flush_folders(part)
        final = self.folder / f"step-{manifest.step:08d}"
        if final.exists():
            final.rename(self.folder / f"replaced-{manifest.step:08d}-{token}")
        part.rename(final)
        flush(self.folder)
        return final

    def _tidy(self, final: Path, token: str) -> None:
        """The new checkpoint is safe; what fails here is only worth a warning."""
        try:
            write_text(self.folder / "latest", final.name + "\n")
        except OSError as error:
            LOG.warning("%s could not be updated (%s); resuming does not need it", self.folder / "latest", error)
        ranked = [path for _, path in sorted(self._finished(), key=_sequence, reverse=True)]
        steps = [path for path in ranked if path.name.startswith("step-")]
        for path in {*ranked} - {*steps[: self.keep]}:
            try:
                discard(path, self.folder / f".tmp-{path.name.split('-')[1]}-{token}")
            except OSError as error:
                LOG.warning("old checkpoint %s could not be deleted (%s); delete it by hand", path, error)

    def _refuse_older_run(self, spec: str | Path) -> None:
        older: list[Path] = self._on_main(lambda: [path for _, path in self._finished()])
        if older:
            raise ConfigError(
                f"run.resume={spec} starts a new run, but {self.folder} holds {older[-1].name} of an earlier one; "
                "set run.resume=auto to go on with it, or choose another run.folder"
            )

    def _finished(self) -> list[tuple[Manifest | None, Path]]:
        """(manifest, None where it is unreadable; folder) of every finished checkpoint."""
        found: list[tuple[Manifest | None, Path]] = []
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if _FINISHED.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                try:
                    found.append((Manifest.read(path), path))
                except CheckpointError:
                    found.append((None, path))
        return found

    def _clean_and_list(self) -> list[Path]:
        """Delete what an interrupted save left; the finished ones, unreadable before readable, then newest first."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if _UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
        ranked = sorted(self._finished(), key=lambda item: (item[0] is None, _sequence(item)), reverse=True)
        return [path for _, path in ranked]

    def _problems(self, folder: Path) -> list[str]:
        """What is wrong with a checkpoint, the same list on every rank; each rank reads a share of the files."""
        try:
            manifest: Manifest = self._on_main(lambda: Manifest.read(folder))
        except CheckpointError as error:
            return [str(error)]
        mine = self._mine({name: record.size for name, record in manifest.files.items()})
        found = gather_objects([check_file(folder, name, manifest.files[name]) for name in mine], self.world)
        return [problem for part in found for problem in part if problem]


def _sequence(item: tuple[Manifest | None, Path]) -> int:
    return item[0].sequence if item[0] else 0
