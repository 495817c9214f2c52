"""Where tokens and patches stand: pure numpy functions of image grids.

In: token ids and grids (t, h, w) in patches; a video's step in time is an image with t = 1, only of video tokens. Out:
MRoPE positions of a prompt, coordinates of vision patches, and the bilinear taps into the learned table of vision
positions. The arithmetic is that of transformers 5.19 (modeling_qwen3_vl.py `get_rope_index`, vision_utils.py), float32
rounding included.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec

Grid = tuple[int, int, int]
T = TypeVar("T", bound=np.generic)


def image_token_count(grid: Grid, merge: int) -> int:
    """Tokens that an image of this grid takes in the prompt: one for each merge x merge patches."""
    t, h, w = grid
    return t * h * w // merge**2


def mrope_positions(token_ids: Sequence[int], grids: Sequence[Grid], spec: Qwen3VLSpec) -> NDArray[np.int64]:
    """Time, height and width positions of each prompt token: int64[3, P].

    Text counts up alike in the three rows. An image that starts at s holds s + (0, row, column) of its merged grid,
    and the text after it goes on at s + max(rows, columns). Steps of a video count as images: the text between them,
    their timestamps, carries the time. ValueError when image and video tokens are not those of `grids`.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    merge = spec.vision.merge_size
    is_image = (ids == spec.image_token_id) | (ids == spec.video_token_id)
    expected = sum(image_token_count(grid, merge) for grid in grids)
    if is_image.sum() != expected:
        raise ValueError(
            f"{int(is_image.sum())} image tokens in the prompt, but its {len(grids)} grids need {expected}"
        )
    positions = np.empty((3, len(ids)), dtype=np.int64)
    done = current = 0
    for grid in grids:
        start = done + int(np.argmax(is_image[done:]))
        end = start + image_token_count(grid, merge)
        if not (is_image[start:end] & (ids[start:end] == ids[start])).all():
            raise ValueError(f"the image tokens from {start} on are not the {end - start} in a row of grid {grid}")
        positions[:, done:start] = np.arange(current, current + start - done)
        current += start - done
        positions[:, start:end] = _merged_coordinates(grid, merge) + current
        current += max(grid[1], grid[2]) // merge
        done = end
    positions[:, done:] = np.arange(current, current + len(ids) - done)
    return positions


@functools.lru_cache(maxsize=1024)
def _merged_coordinates(grid: Grid, merge: int) -> NDArray[np.int64]:
    """(time, row, column) of each image token, in raster order: int64[3, tokens]."""
    t, h, w = grid
    return _read_only(np.indices((t, h // merge, w // merge), dtype=np.int64).reshape(3, -1))


def patch_coordinates(grids: Sequence[Grid], merge: int) -> NDArray[np.int64]:
    """(row, column) of each patch in its own image, in merge-block order, images one after the other: int64[Q, 2]."""
    return _concatenate([_patch_coordinates(grid, merge) for grid in grids], np.empty((0, 2), dtype=np.int64))


@functools.lru_cache(maxsize=1024)
def _patch_coordinates(grid: Grid, merge: int) -> NDArray[np.int64]:
    t, h, w = grid
    raster = np.indices((h, w), dtype=np.int64).reshape(2, h // merge, merge, w // merge, merge)
    blocks = raster.transpose(1, 3, 2, 4, 0).reshape(-1, 2)
    return _read_only(np.tile(blocks, (t, 1)))


def position_interpolation(
    grids: Sequence[Grid], side: int, merge: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Which four rows of the side x side position table each patch mixes, and with which weights.

    index: int64[Q, 4], weight: float32[Q, 4], patches as in `patch_coordinates`. The corners of the image fall on the
    corners of the table.
    """
    parts = [_position_interpolation(grid, side, merge) for grid in grids]
    index = _concatenate([part[0] for part in parts], np.empty((0, 4), dtype=np.int64))
    weight = _concatenate([part[1] for part in parts], np.empty((0, 4), dtype=np.float32))
    return index, weight


@functools.lru_cache(maxsize=1024)
def _position_interpolation(grid: Grid, side: int, merge: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    row, column = _patch_coordinates(grid, merge).T
    rows, row_weights = _axis_taps(row, grid[1], side)
    columns, column_weights = _axis_taps(column, grid[2], side)
    index = (rows[:, :, None] * side + columns[:, None, :]).reshape(-1, 4)
    weight = (row_weights[:, :, None] * column_weights[:, None, :]).reshape(-1, 4)
    return _read_only(index), _read_only(weight)


def _axis_taps(place: NDArray[np.int64], size: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The two table rows around each place of an axis of `size` patches, and their weights: [Q, 2] each."""
    source = place.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    low = np.floor(source)
    distance = np.abs((source - low)[:, None] - np.arange(2, dtype=np.float32))
    taps = np.clip(low.astype(np.int64)[:, None] + np.arange(2), 0, side - 1)
    return taps, np.float32(1) - distance


def _concatenate(parts: list[NDArray[T]], empty: NDArray[T]) -> NDArray[T]:
    return np.concatenate(parts) if parts else empty


def _read_only(array: NDArray[T]) -> NDArray[T]:
    """Cached arrays are shared, so nobody may write into them."""
    array = np.ascontiguousarray(array)
    array.flags.writeable = False
    return array
