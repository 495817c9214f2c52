"""The parallel model equals transformers, and a run in one process, for each layout.

Log-probs, entropies, loss and every gradient by Hugging Face name are compared with padded rows in transformers at
float64; the metrics of an RL step, and the weights after it and two more updates, with those of one process.
`--write-layouts` puts the errors that were seen into docs/layouts.md.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from megatron_vlrl.types import RolloutGroup
from tests.reference import (
    Reference,
    at_rate,
    backend_options,
    hf_reference,
    make_groups,
    make_microbatches,
    relative,
    renderer_and_sampling,
    token_loss,
)
from tests.rl_step import Measured, metric_errors, rl_step, write_answers
from tests.spawn import run_ranks
from tests.tiny import make_tiny
from tools.pages import write_parts

pytestmark = pytest.mark.layouts

# Which of the five groups share a row. The fourth of `four` has no image: its rank's vision tower has nothing to do.
CUTS = {"two": [[0, 1, 2], [3, 4]], "four": [[0], [2], [3], [1, 4]], "uneven": [[0, 2], [1], [3, 4]], "one": [range(5)]}
# Packed tokens of a microbatch of the RL step, for as many microbatches.
TOKENS = {"two": 100, "four": 50, "uneven": 60, "one": 10**6}


@dataclass(frozen=True)
class Layout:
    """One line of the table. parallel: settings; rows: grouped, or a row for each response."""

    parallel: dict[str, object] = field(default_factory=dict)
    cut: str = "two"
    single: bool = False
    tied: tuple[bool, ...] = (True, False)
    slow: bool = True

    def degree(self, name: str) -> int:
        degree = self.parallel.get(name, 1)
        assert isinstance(degree, int)
        return degree

    @property
    def world(self) -> int:
        return self.degree("tensor") * self.degree("pipeline") * self.degree("data")


TP2, TP4, PP2, PP4, DP2 = {"tensor": 2}, {"tensor": 4}, {"pipeline": 2}, {"pipeline": 4}, {"data": 2}
DISTRIBUTED = {"distributed": True}
LAYOUTS = {
    "one process": Layout(slow=False),
    "one process, one microbatch": Layout(cut="one", tied=(True,)),
    "one process, a row for each response": Layout(single=True, tied=(True,)),
    "one process, recompute selective": Layout({"recompute": "selective"}, tied=(True,)),
    "TP2": Layout({**TP2, "sequence": False}),
    "TP2 SP": Layout(TP2, slow=False),
    "TP2 SP, a row for each response": Layout(TP2, single=True, tied=(True,)),
    "TP2 SP, recompute full and vision": Layout({**TP2, "recompute": "full", "recompute_vision": True}),
    "TP4 SP": Layout(TP4),
    "PP2": Layout(PP2, slow=False),
    "PP2, uneven microbatches": Layout(PP2, cut="uneven", tied=(True,)),
    "PP2 VPP2": Layout({**PP2, "virtual_pipeline": 2}, slow=False),
    "PP2 VPP4, uneven microbatches": Layout({**PP2, "virtual_pipeline": 4}, cut="uneven"),
    "PP2 VPP2, one microbatch": Layout({**PP2, "virtual_pipeline": 2}, cut="one", tied=(True,)),
    "PP4": Layout(PP4),
    "PP4 VPP2": Layout({**PP4, "virtual_pipeline": 2}, cut="four"),
    "TP2 SP PP2": Layout({**TP2, **PP2}),
    "TP2 SP PP2 VPP2, recompute full": Layout({**TP2, **PP2, "virtual_pipeline": 2, "recompute": "full"}, tied=(True,)),
    "DP2": Layout(DP2, slow=False),
    "DP2, a rank without an image": Layout(DP2, cut="four", tied=(True,)),
    "DP2, distributed optimizer": Layout({**DP2, **DISTRIBUTED}),
    "DP2, overlap": Layout({**DP2, "overlap": True}, cut="four"),
    "DP2, distributed optimizer, overlap": Layout({**DP2, **DISTRIBUTED, "overlap": True}, cut="four"),
    "TP2 SP DP2": Layout({**TP2, **DP2}),
    "TP2 SP DP2, distributed optimizer, overlap": Layout(
        {**TP2, **DP2, **DISTRIBUTED, "overlap": True}, cut="four", tied=(True,)
    ),
    "PP2 DP2": Layout({**PP2, **DP2}, cut="four"),
    "PP2 VPP2 DP2": Layout({**PP2, **DP2, "virtual_pipeline": 2}, cut="four", tied=(True,)),
}


def groups_of(folder: Path, single: bool) -> list[RolloutGroup]:
    """The five groups, or each response as a group of its own."""
    groups = make_groups(renderer_and_sampling(folder)[0])
    return [replace(g, rollouts=(r,)) for g in groups for r in g.rollouts] if single else groups


def make_reference(folder: Path) -> None:
    """Write the padded reference, and the answers of the RL step, beside the model, once for all layouts."""
    _, sampling = renderer_and_sampling(folder)
    torch.save(vars(hf_reference(folder, groups_of(folder, False), sampling)), folder / "reference.pt")
    write_answers(folder)


def make_updated(folder: Path) -> None:
    """Write what the RL step reports, and the weights at the end, in one process."""
    _, measured, weights = run(folder, Layout())
    (folder / "measured.pkl").write_bytes(pickle.dumps(measured))
    torch.save(weights, folder / "updated.pt")


def run(folder: Path, layout: Layout) -> tuple[dict[str, float], Measured, dict[str, torch.Tensor]]:
    """(errors against the padded reference, an RL step, weights after it and two more updates) in this layout."""
    from megatron_vlrl.backends import build_backend

    _, sampling = renderer_and_sampling(folder)
    reference = Reference(**torch.load(folder / "reference.pt", weights_only=True))
    groups = groups_of(folder, layout.single)
    cuts = [range(k, len(groups), 2) for k in (0, 1)] if layout.single else CUTS[layout.cut]
    # A large eps: with Adam's own, 1e-7 in a small gradient becomes a whole step of the weight.
    backend = build_backend(backend_options(folder, sampling, eps=1.0, **layout.parallel))
    data, multiple = backend.groups.data, backend.groups.tensor.size
    batches = make_microbatches(groups, reference, cuts[data.rank :: data.size], multiple)
    whole = backend.score(make_microbatches(groups, reference, [range(len(groups))], multiple))[0]
    update = backend.train_step(batches, token_loss, at_rate(0.0))
    gradients = dict(backend.hf_gradients())
    assert set(gradients) == set(reference.gradients)
    norm = float(torch.stack([gradient.norm() for gradient in reference.gradients.values()]).norm())
    errors = {
        "log-probs": relative(whole.log_probs, reference.log_probs),
        "entropies": relative(whole.entropies, reference.entropies),
        # Tokens' shares of both signs nearly cancel in the loss: what it is measured against is their size.
        "loss": abs(update.sums["loss"] - float(reference.loss)) / float(reference.loss_scale),
        "gradients": max(relative(gradients[name], expected) for name, expected in reference.gradients.items()),
        "gradient norm": abs(update.grad_norm - norm) / norm,
    }
    assert update.sums["tokens"] == len(reference.log_probs)
    assert update.maxima["top"] == pytest.approx(float(reference.log_probs.max()), rel=1e-5)
    # A rate at which the second minibatch sees a policy that moved: its KL is then far above rounding of log-probs.
    measured = rl_step(backend, folder, at_rate(0.03), microbatch_tokens=TOKENS[layout.cut], single=layout.single)
    for _ in range(2):
        assert backend.train_step(batches, token_loss, at_rate(1.0)).skipped is None
    weights = {name: weight.clone() for name, weight in backend.hf_weights()}
    backend.close()
    return errors, measured, weights


def compare(folder: Path, layout: Layout) -> dict[str, float]:
    """All errors of this rank."""
    errors, measured, weights = run(folder, layout)
    alone = pickle.loads((folder / "measured.pkl").read_bytes())
    of_metrics = metric_errors(measured, alone, layout.degree("data"))
    print({name: f"{error:.0e}" for name, error in of_metrics.items() if error})  # shown when the test fails
    errors["RL metrics"] = max(of_metrics.values())
    expected = torch.load(folder / "updated.pt", weights_only=True)
    started = dict(_weights_of(folder))
    moved = min(relative(expected[name], started[name]) for name in expected)
    assert moved > 1e-4, "an update that left a weight out would not be seen"
    return {**errors, "weights": max(relative(weights[name], expected[name]) for name in expected)}


def _weights_of(folder: Path) -> list[tuple[str, torch.Tensor]]:
    from megatron_vlrl.models.hf_files import HFWeights

    weights = HFWeights(folder)
    return [(name, weights.get(name)) for name in weights.names]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A tied and an untied model of 8 layers; more DeepStack layers (3) than a first stage of PP4 holds."""
    folders = {
        tied: make_tiny(tmp_path_factory.mktemp("model"), tied=tied, layers=8, deepstack=(0, 1, 2), heads=(8, 4))
        for tied in (True, False)
    }
    for folder in folders.values():
        run_ranks(make_reference, 1, folder)
        run_ranks(make_updated, 1, folder)
    return folders


@pytest.fixture(scope="module")
def layout_table(request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, float]]]:
    """Layout -> greatest errors; written into the page at the end, if asked and if every layout has run."""
    table: dict[str, dict[str, float]] = {}
    yield table
    if request.config.getoption("--write-layouts"):
        assert set(table) == set(LAYOUTS), "the page shows all layouts: run all of them"
        kinds = list(next(iter(table.values())))
        lines = ["| layout | processes | " + " | ".join(kinds) + " |", "| --- | ---: |" + " ---: |" * len(kinds)]
        for name, layout in LAYOUTS.items():
            numbers = " | ".join(f"{table[name][kind]:.0e}" for kind in kinds)
            lines.append(f"| {name} | {layout.world} | {numbers} |")
        write_parts(Path(__file__).parents[1] / "docs" / "layouts.md", {"table": "\n".join(lines)})


CASES = [
    pytest.param(name, tied, id=f"{name}-{'tied' if tied else 'untied'}", marks=[pytest.mark.slow] * layout.slow)
    for name, layout in LAYOUTS.items()
    for tied in layout.tied
]


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_layout_equals_transformers(
    name: str, tied: bool, folders: dict[bool, Path], layout_table: dict[str, dict[str, float]]
) -> None:
    ranks = run_ranks(compare, LAYOUTS[name].world, folders[tied], LAYOUTS[name], timeout=100)
    worst = {kind: max(rank[kind] for rank in ranks) for kind in ranks[0]}
    row = layout_table.setdefault(name, {})
    row.update({kind: max(error, row.get(kind, 0.0)) for kind, error in worst.items()})
    assert not {kind: error for kind, error in worst.items() if not error < 1e-5}
