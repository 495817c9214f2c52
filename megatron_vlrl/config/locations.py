"""Where shards may lie, as written in a configuration: a folder, or `s3://bucket/prefix`."""

from __future__ import annotations

REMOTE_SCHEMES = ("s3",)


def why_no_location(where: str) -> str | None:
    """What is wrong with a folder or URL, without repeating what may be a secret; None if it can be tried."""
    scheme, mark, rest = where.partition("://")
    if not mark:
        return None
    if scheme not in REMOTE_SCHEMES:
        return f"scheme {scheme}:// is not known; give a folder, or {', '.join(f'{s}://' for s in REMOTE_SCHEMES)}"
    bucket = rest.partition("/")[0]
    if "@" in bucket or ":" in bucket:
        return (
            f"a {scheme}:// URL holds credentials or a port before its first slash (not repeated here); write "
            f"{scheme}://BUCKET/PREFIX alone and set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
        )
    if "?" in rest or "#" in rest:
        return f"a {scheme}:// URL has a query or fragment (not repeated here); write {scheme}://BUCKET/PREFIX alone"
    if not bucket:
        return f"{where} names no bucket; write {scheme}://BUCKET/PREFIX"
    return None
