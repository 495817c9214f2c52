"""Geometry equals transformers' own functions, on odd sizes, several images and none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from megatron_vlrl.models.qwen3_vl import geometry
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from tests.tiny import make_tiny

GRIDS = [
    [(1, 6, 6)],
    [(1, 2, 2), (1, 14, 4)],
    [(1, 4, 18), (1, 6, 6), (1, 10, 2)],
    [(1, 34, 22)],
    [(2, 4, 6), (1, 2, 8)],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Qwen3VLForConditionalGeneration, Qwen3VLSpec]:
    folder = make_tiny(tmp_path_factory.mktemp("tiny"), layers=1, vision_depth=1, deepstack=(0,))
    return Qwen3VLForConditionalGeneration.from_pretrained(folder), Qwen3VLSpec.load(Path(folder))


def prompt_ids(grids: list[geometry.Grid], spec: Qwen3VLSpec, seed: int) -> list[int]:
    """Random text of 1 to 5 tokens before, between and after the images."""
    random = np.random.default_rng(seed)
    ids: list[int] = []
    for grid in [*grids, None]:
        ids += random.integers(20, 300, size=random.integers(1, 6)).tolist()
        if grid is not None:
            count = geometry.image_token_count(grid, spec.vision.merge_size)
            ids += [spec.vision_start_token_id, *[spec.image_token_id] * count, spec.vision_end_token_id]
    return ids


@pytest.mark.parametrize("grids", [g for g in GRIDS if all(t == 1 for t, _, _ in g)] + [[]])
def test_prompt_positions_equal_get_rope_index(model: tuple, grids: list[geometry.Grid]) -> None:
    network, spec = model
    for seed in range(3):
        ids = prompt_ids(grids, spec, seed)
        types = (torch.tensor([ids]) == spec.image_token_id).int()
        grid_thw = torch.tensor(grids) if grids else None
        want, _ = network.model.get_rope_index(torch.tensor([ids]), types, image_grid_thw=grid_thw)
        got = geometry.mrope_positions(ids, grids, spec)
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, want[:, 0].numpy())


def test_image_may_begin_or_end_the_prompt(model: tuple) -> None:
    _, spec = model
    ids = [spec.image_token_id] * 6
    got = geometry.mrope_positions(ids, [(1, 4, 6)], spec)
    np.testing.assert_array_equal(got, [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]])


@pytest.mark.parametrize("ids_of", [lambda i: [9, i, i, i, 9], lambda i: [9, i, i, 9, i, i, 9]])
def test_image_tokens_that_do_not_fit_the_grids_are_refused(model: tuple, ids_of: Callable[[int], list[int]]) -> None:
    _, spec = model
    with pytest.raises(ValueError, match="image tokens"):
        geometry.mrope_positions(ids_of(spec.image_token_id), [(1, 4, 4)], spec)


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("merge", [1, 2])
def test_patch_coordinates_equal_transformers(grids: list[geometry.Grid], merge: int) -> None:
    want = get_vision_position_ids(torch.tensor(grids), merge)
    np.testing.assert_array_equal(geometry.patch_coordinates(grids, merge), want.numpy())


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize(("side", "merge"), [(8, 2), (48, 2), (5, 1)])
def test_position_interpolation_is_bit_equal_to_transformers(grids: list[geometry.Grid], side: int, merge: int) -> None:
    index, weight = get_vision_interpolation_indices_and_weights(
        torch.tensor(grids), side, mode="bilinear", align_corners=True, spatial_merge_size=merge
    )
    got_index, got_weight = geometry.position_interpolation(grids, side, merge)
    np.testing.assert_array_equal(got_index, index.numpy())
    assert got_weight.dtype == np.float32
    np.testing.assert_array_equal(got_weight, weight.numpy())


def test_no_images_give_empty_arrays_of_the_same_kind() -> None:
    index, weight = geometry.position_interpolation([], 8, 2)
    assert geometry.patch_coordinates([], 2).shape == (0, 2)
    assert (index.shape, weight.shape, weight.dtype) == ((0, 4), (0, 4), np.float32)


def test_cached_arrays_cannot_be_corrupted() -> None:
    geometry.patch_coordinates([(1, 4, 4)], 2)[:] = -1
    assert geometry.patch_coordinates([(1, 4, 4)], 2).min() == 0
