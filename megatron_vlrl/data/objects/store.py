"""What a place of shards can do, whether it is a folder or a bucket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """size: bytes. tag: changes whenever the bytes do (an ETag); None where the place keeps none, as folders."""

    size: int
    tag: str | None = None

    def __str__(self) -> str:
        return f"{self.size} bytes" + (f" with ETag {self.tag}" if self.tag else "")


class ObjectStore(Protocol):
    """Objects by plain name under one folder or prefix. Every method raises DataError with the object's full name.

    expected: what the object must still be; one of another size or tag is a DataError that names both.
    """

    @property
    def url(self) -> str:
        """The folder or URL as given; holds no secret."""

    def size_and_tag(self, name: str) -> ObjectInfo:
        """Of one object, now."""

    def read(self, name: str, start: int, length: int, expected: ObjectInfo | None = None) -> bytes:
        """Exactly the bytes [start, start + length); fewer are an error."""

    def read_all(self, name: str) -> bytes:
        """A whole object."""

    def list(self) -> Mapping[str, ObjectInfo]:
        """Every object directly under the folder or prefix, by name; empty where there is none."""
