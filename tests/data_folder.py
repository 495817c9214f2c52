"""A small dataset for tests: JSONL lines, images on disk, and the shards made of them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_vlrl.data.prepare import prepare


def png(grey: int, size: tuple[int, int] = (4, 4)) -> bytes:
    """One flat grey PNG."""
    buffer = io.BytesIO()
    Image.new("L", size, grey).save(buffer, "PNG")
    return buffer.getvalue()


def line(key: str, task: str = "count", **fields: Any) -> dict[str, Any]:
    """One JSONL record with its image at KEY.png."""
    return {"key": key, "task": task, "prompt": "How many?", "images": [f"{key}.png"], "answer": "1", **fields}


def write_source(folder: Path, records: Sequence[Mapping[str, Any]]) -> tuple[Path, Path]:
    """Write records to data.jsonl and a grey image, its own for each record, to images/; returns both paths."""
    images = folder / "images"
    images.mkdir(parents=True)
    for number, record in enumerate(records):
        (images / f"{record['key']}.png").write_bytes(png(number % 256))
    jsonl = folder / "data.jsonl"
    jsonl.write_text("".join(json.dumps(record) + "\n" for record in records))
    return jsonl, images


def make_shards(folder: Path, counts: Mapping[str, int], samples_per_shard: int = 7) -> Path:
    """Shards with `counts[task]` samples of each task, keys `<task>-<n>`, the tasks one after another."""
    records = [line(f"{task}-{n}", task, answer=str(n)) for task, count in counts.items() for n in range(count)]
    jsonl, images = write_source(folder, records)
    prepare(jsonl, images, folder / "shards", samples_per_shard)
    return folder / "shards"
