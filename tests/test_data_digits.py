"""The quickstart's digits: answers are read back from the pixels, and held-out scans are never trained on."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from examples.quickstart import make_digits as digits
from megatron_vlrl import tasks
from megatron_vlrl.data.loader import held_out
from megatron_vlrl.data.prepare import prepare

PER_TASK = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    digits.main(["--out", str(out), "--train", "150", "--held-out", str(PER_TASK), "--seed", "3"])
    return out


def _records(folder, split, task=None):
    records = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    return [record for record in records if task in (None, record["task"])]


def _ink(folder, record):
    """float[96, 96]: how far each pixel is from the paper, 0 to about 1."""
    pixels = np.asarray(Image.open(folder / "images" / record["images"][0]), np.float32)
    assert pixels.shape == (96, 96)
    paper = np.median(pixels)
    return np.clip((pixels - paper) / (pixels.max() - paper), 0, 1)


def _cells(ink):
    """(row, column, float[32, 32]) of each cell of the canvas that holds ink, in reading order."""
    tiles = ink.reshape(3, 32, 3, 32).swapaxes(1, 2)
    return [(r, c, tiles[r, c]) for r in range(3) for c in range(3) if tiles[r, c].max() > 0.2]


@pytest.fixture(scope="module")
def recognise():
    """A reader that knows scans and classes but no record: nearest scan to a cell's ink, cropped and scaled to 8x8."""
    scans, classes = digits.load_scans()

    def crop(image):
        rows, columns = (np.flatnonzero(image.max(axis) > 0.25) for axis in (1, 0))
        part = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return np.asarray(Image.fromarray(part).resize((12, 12), Image.Resampling.BILINEAR)).ravel()

    large = [
        np.asarray(Image.fromarray(s).resize((28, 28), Image.Resampling.BILINEAR), np.float32) / 255 for s in scans
    ]
    known = np.stack([crop(image) for image in large])

    def nearest(cell):
        return int(classes[np.argmin(((known - crop(cell.astype(np.float32))) ** 2).sum(1))])

    return nearest


def test_every_class_is_split_70_to_30_without_overlap(folder):
    train, held = digits.split_scans()
    _, classes = digits.load_scans()
    numbers = [sorted(n for group in split.values() for n in group) for split in (train, held)]
    assert [len(n) for n in numbers] == [1252, 545]
    assert sorted(numbers[0] + numbers[1]) == list(range(1797))
    assert all(classes[n] == digit for split in (train, held) for digit, group in split.items() for n in group)
    used = [
        {n for record in _records(folder, split) for n in record["meta"]["scans"]} for split in ("train", "heldout")
    ]
    assert used[0] <= set(numbers[0])
    assert used[1] <= set(numbers[1])
    assert min(map(len, used)) > 100


def test_no_held_out_scan_has_a_twin_in_training():
    scans, _ = digits.load_scans()
    train, held = ({scans[n].tobytes() for group in split.values() for n in group} for split in digits.split_scans())
    assert not train & held


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_count_is_the_number_of_cells_with_ink(folder, split):
    records = _records(folder, split, "count")
    assert [len(_cells(_ink(folder, r))) for r in records] == [int(r["answer"]) for r in records]
    assert {r["answer"] for r in records} == set("12345")


def test_box_bounds_the_ink_tightly(folder):
    sides = set()
    for record in _records(folder, "heldout", "box"):
        x0, y0, x1, y1 = (12 * v for v in record["answer"])
        rows, columns = (np.flatnonzero(_ink(folder, record).max(axis) > 0.1) for axis in (1, 0))
        assert y0 <= rows[0]
        assert rows[-1] < y1
        assert x0 <= columns[0]
        assert columns[-1] < x1
        # A scan fills its height; a digit "1" leaves much of its width empty.
        assert rows[-1] + 1 - rows[0] > 0.8 * (y1 - y0)
        assert x1 - x0 == y1 - y0
        sides.add(x1 - x0)
    assert sides == {36, 48, 60}


def test_numbers_sums_and_picks_are_those_in_the_pixels(folder, recognise):
    right = total = 0
    for task in ("read", "sum", "pick"):
        for record in _records(folder, "heldout", task):
            cells = _cells(_ink(folder, record))
            seen = [recognise(cell) for _, _, cell in cells]
            answer = str(sum(seen)) if task == "sum" else "".join(map(str, seen))
            assert len({row for row, _, _ in cells}) == 1
            assert task != "read" or len(seen) == len(record["answer"])
            assert task != "read" or np.ptp([column for _, column, _ in cells]) == len(cells) - 1
            right, total = right + (answer == record["answer"]), total + 1
    assert total == 3 * PER_TASK
    assert right / total > 0.95  # the reader errs now and then on a scan blurred to another size


def test_pick_names_three_digits_and_the_answer_is_one(folder):
    places = set()
    for record in _records(folder, "heldout", "pick"):
        match = re.fullmatch(r"Which digit: (\d), (\d) or (\d)\?", record["prompt"])
        assert match is not None
        assert len(set(match.groups())) == 3
        places.add(match.groups().index(record["answer"]))
    assert places == {0, 1, 2}


def test_items_are_fixed_by_seed_and_number(folder, tmp_path):
    digits.main(["--out", str(tmp_path / "same"), "--train", "20", "--held-out", "1", "--seed", "3"])
    digits.main(["--out", str(tmp_path / "other"), "--train", "20", "--held-out", "1", "--seed", "4"])
    first = _records(folder, "train")[:20]
    assert _records(tmp_path / "same", "train") == first
    assert _records(tmp_path / "other", "train") != first
    names = [record["images"][0] for record in first]
    assert [(folder / "images" / n).read_bytes() for n in names] == [
        (tmp_path / "same" / "images" / n).read_bytes() for n in names
    ]


def test_shards_can_be_made_and_demonstrations_earn_the_full_reward(folder, tmp_path):
    def check(task, answer):
        tasks.resolve(task).check_gold(answer)

    prepare(folder / "heldout.jsonl", folder / "images", tmp_path / "shards", 100, check=check)
    samples = held_out(tmp_path / "shards", PER_TASK)
    assert len(samples) == 5 * PER_TASK
    for sample in samples:
        match = re.fullmatch(r"<think>[^<]+</think><answer>([^<]+)</answer>", sample.meta["demonstration"])
        assert match is not None
        assert tasks.resolve(sample.task).accuracy(match.group(1), sample.answer, sample.meta) == 1.0
