"""Right and wrong answers from a random tiny model, as a data set prescribes: a rollout engine, verifiers and shards.

The engine's text is the response's token ids, in the form that every task asks for. What a verifier makes of it is
the sample's gold: so which groups are filtered, or fail, is known beforehand by their position.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlrl.config.schema import RolloutConfig
from megatron_vlrl.data.order import GlobalOrder
from megatron_vlrl.rollout.engine import Engine
from megatron_vlrl.rollout.engines import Codec
from tests.run_folder import Inputs, prepare

ENGINE = "tests.mixed_answers:answering"
TASKS = ("tests.mixed_answers:first", "tests.mixed_answers:second")
BROKEN, NAMELESS = "B", "?"
GOLDS = {
    "M": "mixed",
    "R": "right",
    "W": "wrong",
    "X": "raises",
    "N": "nan",
    "I": "inf",
    "-": "negative",
    "S": "sometimes",
    BROKEN: "mixed",  # but the image cannot be decoded
    NAMELESS: "mixed",  # but without `meta.family`
}


def answering(folder: Path, codec: Codec, config: RolloutConfig, dtype: str) -> Engine:
    """`rollout.engine`: transformers, but each response reads as an answer in the right form: its token ids."""
    from megatron_vlrl.rollout.engines.transformers import TransformersEngine

    def decode(ids: Sequence[int]) -> str:
        return f"<think></think><answer>{' '.join(map(str, ids))}</answer>"

    return TransformersEngine(folder, decode=decode, batch_prompts=config.batch_prompts, dtype=dtype)


def first(text: str, gold: Any, meta: Mapping[str, Any]) -> float:
    """A task: what `gold` says. Mixed is a share that hangs on the tokens, so four of them are hardly ever alike."""
    total = sum(map(int, text.split()))
    match gold:
        case "raises":
            raise RuntimeError("this verifier is broken")
        case "sometimes" if total % 2:
            raise ZeroDivisionError("an odd sum")
        case "mixed" | "sometimes":
            return (total % 97) / 97
    return {"right": 1.0, "wrong": 0.0, "nan": math.nan, "inf": math.inf, "negative": -1.0}[gold]


def second(text: str, gold: Any, meta: Mapping[str, Any]) -> float:
    """Another task, judged alike."""
    return first(text, gold, meta)


def write_shards(folder: Path, inputs: Inputs, script: str) -> Path:
    """Shards with a sample for each letter of `script`, a key of GOLDS, in the order in which seed 0 draws them; their
    keys are their positions, the tasks take turns, and `meta.family` is that of two positions together."""
    rows = [json.loads(line) for line in (inputs.raw / "train.jsonl").read_text().splitlines()]
    members = {task: np.arange(number, len(script), len(TASKS)) for number, task in enumerate(TASKS)}
    order = GlobalOrder(members, dict.fromkeys(TASKS, 1), 0).samples(0, len(script))
    images = folder / "images"
    images.mkdir(parents=True)
    with open(folder / "data.jsonl", "w") as lines:
        for number, position in sorted(zip(order, range(len(script)), strict=True)):
            source, letter = rows[position % len(rows)], script[position]
            image = (inputs.raw / "images" / source["images"][0]).read_bytes()
            (images / f"{position}.png").write_bytes(image[:100] if letter == BROKEN else image)
            record = {
                "key": f"{position:03d}",
                "task": TASKS[number % len(TASKS)],
                "prompt": source["prompt"],
                "images": [f"{position}.png"],
                "answer": GOLDS[letter],
                "meta": {} if letter == NAMELESS else {"family": "even" if position // 2 % 2 == 0 else "odd"},
            }
            lines.write(json.dumps(record) + "\n")
    prepare(folder / "data.jsonl", images, folder / "shards")
    return folder / "shards"
