"""A bucket's prefix as an ObjectStore, over a client of obstore (Rust's object_store): S3 today.

In: names and byte ranges. Out: bytes, whole and of one version of the object, or a DataError. The client itself never
retries: what is tried again, for how long and from which byte is decided here, where it can be bounded and tested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from megatron_vlrl.data.objects.effort import Effort, Patience
from megatron_vlrl.data.objects.failures import MISSING, Failure, diagnose
from megatron_vlrl.data.objects.store import ObjectInfo
from megatron_vlrl.errors import DataError

PAGE = 1000  # objects in one answer of a listing
_T = TypeVar("_T")


class RemoteStore:
    """Objects under `url`. client: an obstore store of that prefix which does not retry."""

    def __init__(self, url: str, client: Any, patience: Patience) -> None:
        import obstore
        from obstore.exceptions import BaseError

        self.url = url.rstrip("/")
        self._obstore, self._client, self._patience = obstore, client, patience
        self._answered = False
        self._errors = (BaseError, OSError, ValueError)  # obstore's own, and the built-in ones that it raises too

    def __repr__(self) -> str:
        return f"RemoteStore({self.url!r})"

    def size_and_tag(self, name: str) -> ObjectInfo:
        """By one HEAD request."""
        effort = Effort(self._full(name), self._patience)
        while True:
            info, failure = self._try(partial(self._obstore.head, self._client, name))
            if info is not None:
                return _info(info)
            self._wait(name, effort, failure)

    def read(self, name: str, start: int, length: int, expected: ObjectInfo | None = None) -> bytes:
        """One range request; what a cut leaves missing is asked for from the byte after the last that came."""
        body = bytearray()
        effort = Effort(self._full(name), self._patience, length)
        while len(body) < length:
            span = (start + len(body), start + length)
            ask = partial(self._obstore.get, self._client, name, options={"range": span})
            answer, failure = self._try(ask)
            if answer is not None:
                expected = self._same(name, _info(answer.meta), expected, start + length)
                failure = self._take(answer, body, length, effort)
            if len(body) < length:
                self._wait(name, effort, failure)
        return bytes(body)

    def read_all(self, name: str) -> bytes:
        """A HEAD request for the size, then the bytes of that very version."""
        info = self.size_and_tag(name)
        return self.read(name, 0, info.size, info)

    def list(self) -> Mapping[str, ObjectInfo]:
        """Page by page; a page that fails is asked for again, with a budget of its own."""
        found: dict[str, ObjectInfo] = {}
        last: str | None = None
        while True:
            effort = Effort(f"the list of {self.url}", self._patience)
            page, failure = self._try(partial(self._page, last))
            while page is None:
                self._wait("", effort, failure)
                page, failure = self._try(partial(self._page, last))
            if not page:
                return found
            found.update({item["path"]: _info(item) for item in page if "/" not in item["path"]})
            last = page[-1]["path"]

    def _page(self, last: str | None) -> Sequence[Any]:
        return next(iter(self._obstore.list(self._client, offset=last, chunk_size=PAGE)), [])

    def _take(self, answer: Any, body: bytearray, length: int, effort: Effort) -> Failure:
        """Append what comes; how the answer ended before `length` bytes were there, if it did."""

        def pieces() -> bool:
            for piece in answer.stream(min_chunk_size=1):  # every piece at once: a cut loses none that came
                body.extend(memoryview(piece)[: length - len(body)])
                effort.progress()
                if not effort.in_time():
                    break
            return True

        return self._try(pieces)[1] or Failure("the answer ended early")

    def _try(self, call: Callable[[], _T]) -> tuple[_T | None, Failure | None]:
        """Its result, or its failure; the library's exception ends here, so that no traceback can show its text."""
        try:
            result = call()
        except self._errors as error:
            return None, diagnose(error)
        self._answered = True
        return result, None

    def _wait(self, name: str, effort: Effort, failure: Failure | None) -> None:
        assert failure is not None
        if failure.fix and not (failure.role and self._answered):
            raise DataError(f"cannot read {self._full(name)}: {failure.problem}; {failure.fix}")
        effort.failed(failure.problem)

    def _same(self, name: str, found: ObjectInfo, expected: ObjectInfo | None, end: int) -> ObjectInfo:
        if expected is not None and found != expected:
            raise DataError(
                f"{self._full(name)} has {found} where {expected} were expected; it was replaced or cut short: upload "
                "the folder again, and keep it as it is while a run reads it"
            )
        if found.size < end:
            raise DataError(
                f"{self._full(name)} has {found.size} bytes, but bytes up to {end} were asked for; {MISSING}"
            )
        return found

    def _full(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url


def _info(meta: Mapping[str, Any]) -> ObjectInfo:
    return ObjectInfo(size=meta["size"], tag=(meta["e_tag"] or "").strip('"') or None)
