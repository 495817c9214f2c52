"""Real handwritten digits on grey canvases: five small visual tasks as JSONL and PNG, without a download.

    python examples/quickstart/make_digits.py --out DIR --train N --held-out M --seed S

writes DIR/images/*.png, DIR/train.jsonl (N items over all tasks) and DIR/heldout.jsonl (M items of each task), ready
for `megatron-vlrl data prepare --images DIR/images`. The digits are scikit-learn's 1,797 scans; every class is split
70 to 30 between the two files, the same way for every seed, so that no scan of a held-out item is ever trained on.

A canvas is 96x96 pixels. Digits of 26 to 30 pixels stand in cells of 32; the digit of the `box` task is larger and
stands on a grid of 12 pixels, in whose units its box is asked for. An item depends on its split, number and seed alone.
`meta.demonstration` is what a supervised warm start imitates.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CANVAS = 96
CELL = 32
CELLS = CANVAS // CELL
UNIT = 12  # of the box task's grid
GRID = CANVAS // UNIT
DIGIT_PIXELS = (26, 30)
JITTER = 2
PAPER = (118, 138)
INK = (235, 255)
TRAIN_SHARE = 0.7

Scans = dict[int, list[int]]  # class -> numbers in scikit-learn's set
Pixels = NDArray[np.float32]


@cache
def load_scans() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All scans, uint8[1797, 8, 8] with ink bright, and their classes, int64[1797]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * (255 / 16)).astype(np.uint8), digits.target


def split_scans() -> tuple[Scans, Scans]:
    """Scans for training and for held-out items: disjoint, 70 to 30 in every class, fixed."""
    _, classes = load_scans()
    shuffle = np.random.RandomState(0)
    train: Scans = {}
    held_out: Scans = {}
    for digit in range(10):
        numbers = np.flatnonzero(classes == digit)
        shuffle.shuffle(numbers)
        cut = int(TRAIN_SHARE * len(numbers))
        train[digit], held_out[digit] = sorted(numbers[:cut].tolist()), sorted(numbers[cut:].tolist())
    return train, held_out


@cache
def _coverage(scan: int, size: int) -> Pixels:
    """A scan enlarged to size x size, as the share of ink in each pixel, 0 to 1."""
    image = Image.fromarray(load_scans()[0][scan]).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32) / np.float32(255)


@dataclass
class Canvas:
    """A sheet being drawn on, with the random source of its item and the scans that it may use."""

    rng: random.Random
    scans: Scans
    pixels: Pixels = field(init=False)
    used: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pixels = np.full((CANVAS, CANVAS), self.rng.randint(*PAPER), np.float32)
        self.ink = self.rng.randint(*INK)

    def put(self, digit: int, x: int, y: int, size: int) -> None:
        """Draw a random scan of `digit` with its corner at (x, y)."""
        scan = self.rng.choice(self.scans[digit])
        area = self.pixels[y : y + size, x : x + size]
        area += _coverage(scan, size) * (self.ink - area)
        self.used.append(scan)

    def put_in_cell(self, digit: int, row: int, column: int) -> None:
        """Draw `digit` in a cell, near its middle and whole."""
        size = self.rng.randint(*DIGIT_PIXELS)
        spare = CELL - size
        x, y = (min(max(spare // 2 + self.rng.randint(-JITTER, JITTER), 0), spare) for _ in range(2))
        self.put(digit, column * CELL + x, row * CELL + y, size)


@dataclass(frozen=True)
class Question:
    """What is asked about a canvas, the gold answer, and the thought of the demonstration."""

    prompt: str
    answer: str | list[int]
    thought: str

    @property
    def demonstration(self) -> str:
        """The response that a warm start imitates."""
        answer = self.answer if isinstance(self.answer, str) else json.dumps(self.answer, separators=(",", ":"))
        return f"<think>{self.thought}</think><answer>{answer}</answer>"


def draw_count(canvas: Canvas) -> Question:
    """One to five digits anywhere; how many?"""
    rng = canvas.rng
    cells = rng.sample(range(CELLS * CELLS), rng.randint(1, 5))
    for cell in cells:
        canvas.put_in_cell(rng.randrange(10), *divmod(cell, CELLS))
    return Question("How many digits?", str(len(cells)), "count")


def draw_read(canvas: Canvas) -> Question:
    """Two or three digits side by side; which number?"""
    rng = canvas.rng
    digits = [rng.randrange(10) for _ in range(rng.randint(2, 3))]
    row, first = rng.randrange(CELLS), rng.randint(0, CELLS - len(digits))
    for column, digit in enumerate(digits, first):
        canvas.put_in_cell(digit, row, column)
    return Question("Read the number.", "".join(map(str, digits)), f"{len(digits)} digits")


def draw_box(canvas: Canvas) -> Question:
    """One digit of 36 to 60 pixels; its box [x0, y0, x1, y1] in units of the grid."""
    rng = canvas.rng
    side = rng.randint(3, 5)
    x, y = rng.randint(0, GRID - side), rng.randint(0, GRID - side)
    canvas.put(rng.randrange(10), x * UNIT, y * UNIT, side * UNIT)
    return Question("Give the box of the digit.", [x, y, x + side, y + side], "box")


def draw_sum(canvas: Canvas) -> Question:
    """Two digits in one row; their sum?"""
    rng = canvas.rng
    left, right = rng.randrange(10), rng.randrange(10)
    row = rng.randrange(CELLS)
    for digit, column in zip((left, right), sorted(rng.sample(range(CELLS), 2)), strict=True):
        canvas.put_in_cell(digit, row, column)
    return Question("Sum of the two digits?", str(left + right), f"{left}+{right}")


def draw_pick(canvas: Canvas) -> Question:
    """One digit; which of three named ones is it?"""
    rng = canvas.rng
    named = rng.sample(range(10), 3)
    shown = rng.choice(named)
    canvas.put_in_cell(shown, rng.randrange(CELLS), rng.randrange(CELLS))
    return Question(f"Which digit: {named[0]}, {named[1]} or {named[2]}?", str(shown), "one digit")


TASKS: dict[str, Callable[[Canvas], Question]] = {
    "count": draw_count,
    "read": draw_read,
    "box": draw_box,
    "sum": draw_sum,
    "pick": draw_pick,
}


def items(split: str, scans: Scans, count: int, seed: int) -> Iterator[tuple[dict[str, Any], Image.Image]]:
    """`count` JSONL records with their images, the tasks in turn."""
    for number in range(count):
        task = list(TASKS)[number % len(TASKS)]
        canvas = Canvas(random.Random(f"{seed}/{split}/{number}"), scans)
        question = TASKS[task](canvas)
        key = f"{split}-{task}-{number:06d}"
        record = {
            "key": key,
            "task": task,
            "prompt": question.prompt,
            "images": [f"{key}.png"],
            "answer": question.answer,
            "meta": {"demonstration": question.demonstration, "scans": canvas.used},
        }
        yield record, Image.fromarray(canvas.pixels.astype(np.uint8))


def write(out: Path, split: str, scans: Scans, count: int, seed: int) -> None:
    """Write one split: its JSONL, and its images beside those of the other."""
    folder = out / "images"
    folder.mkdir(parents=True, exist_ok=True)
    with open(out / f"{split}.jsonl", "w", encoding="utf-8") as lines:
        for record, image in items(split, scans, count, seed):
            image.save(folder / record["images"][0], compress_level=1)
            lines.write(json.dumps(record) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write both splits."""
    parser = argparse.ArgumentParser(description="Five visual tasks on real handwritten digits.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=20000, help="training items over all tasks")
    parser.add_argument("--held-out", type=int, default=128, help="held-out items of each task")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    train, held_out = split_scans()
    write(options.out, "train", train, options.train, options.seed)
    write(options.out, "heldout", held_out, options.held_out * len(TASKS), options.seed)
    print(f"{options.out}: {options.train} training and {options.held_out * len(TASKS)} held-out items")


if __name__ == "__main__":
    main()
