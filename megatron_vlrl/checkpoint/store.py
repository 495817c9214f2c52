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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_vlrl.checkpoint.files import discard, flush, flush_folders, list_files, write_text
from megatron_vlrl.checkpoint.manifest import FileRecord, Manifest, check_file, describe_file
from megatron_vlrl.errors import CheckpointError, ConfigError
from megatron_vlrl.parallel.collectives import gather_objects
from megatron_vlrl.parallel.groups import Group

LOG = logging.getLogger(__name__)

_FINISHED = re.compile(r"(step-\d{8}|replaced-\d{8}-[0-9a-f]{8})")
_BLOCK = 4096  # bytes; a file takes up to one block more than its length
_UNFINISHED = re.compile(r"\.tmp-\d{8}-[0-9a-f]{8}")
# What a full or failing disk looks like: Python's files, torch's zip writer (RuntimeError), a backend's own wording.
_WRITE_ERRORS = (OSError, RuntimeError, CheckpointError)


class CheckpointStore:
    """The checkpoints of one run. `save` and `find` are collective over `world`; rank 0 names, commits and deletes."""

    def __init__(self, folder: Path, *, keep: int, world: Group) -> None:
        """folder: made at the first save. keep: finished checkpoints that stay, 1 or more."""
        if keep < 1:
            raise ConfigError(f"checkpoint.keep is {keep}; keep 1 or more, or the run could not be resumed")
        self.folder = Path(folder)
        self.keep = keep
        self.world = world

    def save(self, step: int, write: Callable[[Path], None], *, layout: Mapping[str, Any]) -> Path:
        """Call `write(folder)` on every rank, then make what it wrote the newest checkpoint; return its folder.

        `write` may raise OSError, RuntimeError or CheckpointError on any rank, but must not leave the others waiting
        inside it. Then every rank raises CheckpointError, and the folder is as it was before. layout: JSON-like,
        how the run is spread; it goes into the manifest.
        """
        token = gather_objects(secrets.token_hex(4), self.world)[0]  # a late writer of a dead run never meets ours
        part = self.folder / f".tmp-{step:08d}-{token}"
        try:
            sequence = self._on_main(lambda: self._begin(part))
            self._on_all(lambda: write(part))
            files = self._describe(part)
            manifest = Manifest(step=step, sequence=sequence, layout=layout, files=files)
            final: Path = self._on_main(lambda: self._commit(part, manifest, token))
        except CheckpointError as error:
            self._on_main(lambda: shutil.rmtree(part, ignore_errors=True))
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {error}; earlier checkpoints "
                "are untouched. Free space on that disk, lower checkpoint.keep, or set run.folder to another one"
            ) from error
        self._on_main(lambda: self._tidy(final, token))
        return final

    def find(self, spec: str | Path) -> Path | None:
        """The checkpoint to resume from, every file of it verified, the same on every rank.

        spec: "never" gives None; ConfigError if the folder holds a run already, which a crash of the new one would
        resume. "auto" the newest undamaged one of the folder, None if it holds none; anything else is a
        checkpoint's folder. CheckpointError if that one is damaged, or if "auto" finds damaged ones only.
        """
        if spec == "never":
            self._refuse_older_run()
            return None
        if spec != "auto":
            problems = self._problems(Path(spec))
            if problems:
                raise CheckpointError(
                    f"run.resume={spec}: {'; '.join(problems)}. Name another step-* folder, or use run.resume=auto"
                )
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

    def _describe(self, part: Path) -> dict[str, FileRecord]:
        """Flush and hash what all ranks wrote, each rank a share."""
        sizes: dict[str, int] = self._on_main(lambda: {name: (part / name).stat().st_size for name in list_files(part)})

        def share() -> dict[str, FileRecord]:
            for name in self._mine(sizes):
                flush(part / name)
            return {name: describe_file(part, name) for name in self._mine(sizes)}

        return {name: record for records in self._on_all(share) for name, record in records.items()}

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

    def _refuse_older_run(self) -> None:
        older: list[Path] = self._on_main(lambda: [path for _, path in self._finished()])
        if older:
            raise ConfigError(
                f"run.resume=never, but {self.folder} holds {older[-1].name} of an earlier run; "
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
