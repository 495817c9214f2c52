"""Where shards lie -> one small interface: a local folder or `s3://bucket/prefix`."""

from __future__ import annotations

from pathlib import Path

from megatron_vlrl.config.locations import why_no_location
from megatron_vlrl.data.objects.effort import Patience
from megatron_vlrl.data.objects.folder import Folder
from megatron_vlrl.data.objects.remote import RemoteStore
from megatron_vlrl.data.objects.s3 import connect
from megatron_vlrl.data.objects.store import ObjectInfo, ObjectStore
from megatron_vlrl.errors import DataError

__all__ = ["ObjectInfo", "ObjectStore", "Patience", "open_store"]

_CONNECT = {"s3": connect}


def open_store(where: str | Path, patience: Patience | None = None) -> ObjectStore:
    """The store at a folder or URL; nothing is asked of it yet. Raises DataError for one that cannot be tried."""
    url = str(where)
    if problem := why_no_location(url):
        raise DataError(problem)
    scheme, mark, rest = url.partition("://")
    if not mark:
        return Folder(where)
    patience = patience or Patience()
    bucket, _, prefix = rest.partition("/")
    return RemoteStore(url, _CONNECT[scheme](bucket, prefix.strip("/"), patience), patience)
