"""The frame of the report: text in; escaped, self-contained HTML out.

Nothing on the page is fetched and no script may run: the policy in its head forbids both, whatever a model wrote.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from megatron_vlrl.observe.records import image_suffix
from megatron_vlrl.observe.style import STYLE

_MIME = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
_LARGE_BYTES = 150_000  # larger images are shrunk, so that the page stays one that a browser opens at once
_LARGE_SIDE = 640

# Control characters have no place in HTML; they are shown as their pictures (U+2400 and on), tab and newline kept.
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}

_POLICY = "default-src 'none';img-src data:;style-src 'unsafe-inline'"
_HEAD = (
    '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
)


def escape(text: object) -> str:
    """Any text as HTML text or a quoted attribute: markup, control characters and lone surrogates made harmless."""
    return html.escape(str(text).translate(_CONTROLS), quote=True)


def table(headings: Sequence[str], rows: Sequence[str]) -> str:
    """A table; headings are escaped here, rows are finished `<tr>`s."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def row(cells: Sequence[str], *, kind: str = "") -> str:
    """A table row of plain text cells, escaped here."""
    return f'<tr class="{kind}">{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'


def section(name: str, title: str, body: str) -> str:
    """A titled part that the navigation can point to; `body` is finished HTML."""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>'


def inline_image(path: Path) -> str:
    """An `<img>` that holds the file's bytes (a large one shrunk), or a sentence when it cannot be shown."""
    try:
        data = path.read_bytes()
        data = _shrunk(data) if len(data) > _LARGE_BYTES else data
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        return f'<p class="alarm">image {escape(path.name)}: {escape(error)}</p>'
    suffix = image_suffix(data)
    if suffix not in _MIME:
        return f'<p class="alarm">image {escape(path.name)} is neither PNG, JPEG nor WebP</p>'
    return f'<img alt="{escape(path.name)}" src="data:{_MIME[suffix]};base64,{base64.b64encode(data).decode("ascii")}">'


def _shrunk(data: bytes) -> bytes:
    with Image.open(BytesIO(data)) as image:
        small = image.convert("RGB")
    small.thumbnail((_LARGE_SIDE, _LARGE_SIDE))
    out = BytesIO()
    small.save(out, format="JPEG", quality=85)
    return out.getvalue()


def document(title: str, body: str) -> bytes:
    """The whole page, UTF-8; a character that UTF-8 cannot hold (a lone surrogate) becomes "?"."""
    head = f"<head>{_HEAD}<title>{escape(title)}</title><style>{STYLE}</style></head>"
    page = f'<!doctype html><html lang="en">{head}<body>{body}</body></html>'
    return page.encode("utf-8", "replace")
