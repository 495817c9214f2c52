"""Qwen3-VL-MoE equals transformers in every layout: scores, loss and gradients; its weights go in and out unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.spawn import run_ranks
from tests.test_layouts import compare, make_reference
from tests.tiny import make_tiny

LAYOUTS = {
    "one process": {},
    "tp2 sp": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "dp2": {"data": 2},
    "dp2 ep2": {"data": 2, "expert": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers: the second dense, the others with 4 experts."""
    folder = make_tiny(tmp_path_factory.mktemp("moe"), moe=True)
    run_ranks(make_reference, 1, folder)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_transformers(name: str, folder: Path) -> None:
    parallel = LAYOUTS[name]
    world = parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("data", 1)
    for errors in run_ranks(compare, world, folder, parallel, timeout=40):
        print(name, {key: f"{value:.1e}" for key, value in errors.items()})
        assert max(errors.values()) < 1e-5, errors
