"""The parallel model equals transformers: log-probs, entropies, loss and every gradient, for each layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.reference import (
    MICROBATCHES,
    Reference,
    backend_options,
    hf_reference,
    make_groups,
    make_microbatches,
    relative,
    renderer_and_sampling,
    token_loss,
)
from tests.spawn import run_ranks
from tests.tiny import make_tiny

LAYOUTS = {
    "one process": {},
    "tp2": {"tensor": 2, "sequence": False},
    "tp2 sp": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "dp2": {"data": 2},
    "tp2 sp recompute": {"tensor": 2, "recompute": "full"},
    "pp2 vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "tp2 sp pp2": {"tensor": 2, "pipeline": 2},
}


def make_reference(folder: Path) -> None:
    """Write the padded reference beside the model, once for all layouts."""
    renderer, sampling = renderer_and_sampling(folder)
    torch.save(vars(hf_reference(folder, make_groups(renderer), sampling)), folder / "reference.pt")


def compare(folder: Path, parallel: dict[str, object]) -> dict[str, float]:
    """Run one step in this rank's layout; errors against the padded reference."""
    from megatron_vlrl.backends import build_backend

    renderer, sampling = renderer_and_sampling(folder)
    groups = make_groups(renderer)
    reference = Reference(**torch.load(folder / "reference.pt", weights_only=True))
    backend = build_backend(backend_options(folder, sampling, **parallel))
    data, multiple = backend.groups.data, backend.groups.tensor.size
    cuts = MICROBATCHES[data.rank :: data.size]
    batches = make_microbatches(groups, reference, cuts, multiple)
    scores = backend.score(batches)
    everything = make_microbatches(groups, reference, [range(len(groups))], multiple)
    whole = backend.score(everything)[0]
    update = backend.train_step(batches, token_loss, lr=0.0)
    errors = {name: relative(gradient, reference.gradients[name]) for name, gradient in backend.hf_gradients()}
    assert set(errors) == set(reference.gradients)
    assert sum(len(score.log_probs) for score in scores) == sum(len(batch.target_ids) for batch in batches)
    result = {
        "log_probs": relative(whole.log_probs, reference.log_probs),
        "entropies": relative(whole.entropies, reference.entropies),
        # Tokens' shares of both signs nearly cancel in the loss: what it is measured against is their size.
        "loss": abs(update.sums["loss"] - float(reference.loss)) / float(reference.loss_scale),
        "gradients": max(errors.values()),
        "tokens": update.sums["tokens"] - len(reference.log_probs),
        "maximum": abs(update.maxima["top"] - float(reference.log_probs.max())),
        "grad_norm": abs(update.grad_norm - float(torch.stack([g.norm() for g in reference.gradients.values()]).norm()))
        / update.grad_norm,
    }
    backend.close()
    return result


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A tied and an untied tiny model."""
    folders = {tied: make_tiny(tmp_path_factory.mktemp("model"), tied=tied) for tied in (True, False)}
    for folder in folders.values():
        run_ranks(make_reference, 1, folder)
    return folders


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_transformers(name: str, tied: bool, folders: dict[bool, Path]) -> None:
    parallel = LAYOUTS[name]
    world = 1
    for degree in ("tensor", "pipeline", "data"):
        world *= int(parallel.get(degree, 1))
    for errors in run_ranks(compare, world, folders[tied], parallel, timeout=40):
        print(name, "tied" if tied else "untied", {key: f"{value:.1e}" for key, value in errors.items()})
        assert max(errors.values()) < 1e-5, errors
