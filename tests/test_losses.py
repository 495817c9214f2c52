"""Token objectives against their formulas in float64, written token by token and case by case."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vlrl.algorithms.losses import LOSSES, check_loss_options
from megatron_vlrl.errors import ConfigError

LENGTHS = (1, 7, 20, 3, 1, 32)
RATIO_KINDS = sorted(set(LOSSES) - {"nll"})
CLIPPING = ("ppo_clip", "dual_clip", "gspo")


@dataclass(frozen=True)
class Case:
    """Options of a kind, and the spread of log-ratios at which all its cases occur."""

    options: Mapping[str, float]
    spread: float = 0.4


CASES = {
    "ppo_clip": Case({"clip_low": 0.2, "clip_high": 0.28}),
    "dual_clip": Case({"clip_low": 0.2, "clip_high": 0.28, "clip_c": 1.5}),
    "gspo": Case({"clip_low": 3e-4, "clip_high": 4e-4}, spread=1e-3),
    "cispo": Case({"clip_low": 0.3, "clip_high": 0.4}),
    "sapo": Case({"tau_pos": 2.0, "tau_neg": 3.5}),
    "nll": Case({}),
}


def sequences_of(lengths: Sequence[int]) -> Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))


def columns_of(kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """log-probs, old ones, advantages of both signs and 0, sequences; and weights of the tokens."""
    draw = torch.Generator().manual_seed(0)
    sequences = sequences_of(LENGTHS)

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=draw, dtype=torch.float64)

    old = -3 * normal(len(sequences)).abs()
    # A drift of each response, so that the means of responses lie on both sides of the clips too.
    drift = CASES[kind].spread * (normal(len(sequences)) + torch.tensor([1.0, 1, -1, -1, 0, 0.3])[sequences])
    advantages = torch.tensor([1.5, -1, -0.5, 2, 0, 0.7], dtype=torch.float64)[sequences]
    advantages[::5] = -advantages[::5]  # an objective need not rely on one advantage for a response
    weights = normal(len(sequences)).abs()
    columns = {"new": old + drift, "old": old, "advantages": advantages, "weights": weights}
    return {name: column.to(dtype) for name, column in columns.items()} | {"sequences": sequences}


def apply(
    kind: str, columns: Mapping[str, Tensor], options: Mapping[str, Any] | None = None
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """losses, marks, and the gradient of the weighted sum of the losses."""
    log_probs = columns["new"].clone().requires_grad_()
    given_options = CASES[kind].options if options is None else options
    losses, marks = LOSSES[kind](
        log_probs, columns["old"], columns["advantages"], columns["sequences"], **given_options
    )
    (columns["weights"] * losses).sum().backward()
    return losses.detach(), marks, log_probs.grad


# ---------------------------------------------------------------------- the formulas, by cases


def clipped_case(ratio: Tensor, a: float, low: float, high: float) -> Tensor:
    if a >= 0:
        return ratio * a if ratio <= 1 + high else (1 + high) * a + 0 * ratio
    return ratio * a if ratio >= 1 - low else (1 - low) * a + 0 * ratio


def one_token(kind: str, x: Tensor, y: float, a: float, o: Mapping[str, float]) -> Tensor:
    """The objective of one token: x its log-prob, y its old one, a its advantage, o the options."""
    ratio = torch.exp(x - y)
    if kind == "ppo_clip":
        return clipped_case(ratio, a, o["clip_low"], o["clip_high"])
    if kind == "dual_clip":
        dropped = a < 0 and ratio > o["clip_c"]
        return o["clip_c"] * a + 0 * ratio if dropped else clipped_case(ratio, a, o["clip_low"], o["clip_high"])
    if kind == "cispo":
        return min(max(float(ratio.detach()), 1 - o["clip_low"]), 1 + o["clip_high"]) * a * x
    if kind == "sapo":
        tau = o["tau_pos"] if a > 0 else o["tau_neg"]
        return 4 * a / (tau * (1 + torch.exp(tau * (1 - ratio))))
    assert kind == "nll"
    return x


def by_cases(kind: str, columns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """losses and gradient as in `apply`, in float64, one scalar at a time."""
    new = columns["new"].double().requires_grad_()
    old, advantages, sequences = (columns[name].tolist() for name in ("old", "advantages", "sequences"))
    o = CASES[kind].options
    losses = []
    for token, number in enumerate(sequences):
        if kind == "gspo":
            members = [i for i, other in enumerate(sequences) if other == number]
            product = math.prod((torch.exp(new[i] - old[i]) for i in members), start=torch.ones((), dtype=new.dtype))
            ratio = product ** (1 / len(members))
            losses.append(-clipped_case(ratio, advantages[token], o["clip_low"], o["clip_high"]))
        else:
            losses.append(-one_token(kind, new[token], old[token], advantages[token], o))
    stacked = torch.stack(losses)
    (columns["weights"].double() * stacked).sum().backward()
    return stacked.detach(), new.grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 4e-6)])
@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_value_and_gradient_equal_the_formula(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    columns = columns_of(kind, dtype)
    losses, _, gradient = apply(kind, columns)
    expected, expected_gradient = by_cases(kind, columns)
    assert losses.dtype == gradient.dtype == dtype
    torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------- properties


@pytest.mark.parametrize("kind", RATIO_KINDS)
def test_on_policy_gradient_is_the_policy_gradient(kind: str) -> None:
    columns = columns_of(kind)
    columns["new"] = columns["old"]
    columns["advantages"], columns["weights"] = (
        torch.linspace(s, 2, 6).double()[columns["sequences"]] for s in (-2, 1)
    )
    _, marks, gradient = apply(kind, columns, {})
    torch.testing.assert_close(gradient, -columns["weights"] * columns["advantages"])
    assert not marks["policy_kl"].any()
    assert not marks.get("clip_fraction", torch.zeros(1)).any()


@pytest.mark.parametrize("kind", CLIPPING)
def test_clip_fraction_marks_the_tokens_without_a_gradient(kind: str) -> None:
    columns = columns_of(kind)
    columns["advantages"] = torch.tensor([1.5, -1, -0.5, 2, 0, 0.7], dtype=torch.float64)[columns["sequences"]]
    _, marks, gradient = apply(kind, columns)
    cut = marks["clip_fraction"] == 1.0
    assert 0 < cut.sum() < len(cut)
    assert torch.equal(gradient == 0, cut | (columns["advantages"] == 0))
    assert set(marks["clip_fraction"].tolist()) == {0.0, 1.0}


def test_marks_of_dual_clip_tell_its_two_clips_apart() -> None:
    columns = columns_of("dual_clip")
    _, marks, _ = apply("dual_clip", columns)
    ratio, advantages = torch.exp(columns["new"] - columns["old"]), columns["advantages"]
    second = (advantages < 0) & (ratio > 1.5)
    first = ((advantages > 0) & (ratio > 1.28)) | ((advantages < 0) & (ratio < 0.8))
    assert second.any()
    assert torch.equal(marks["dual_clip_fraction"], second.double())
    assert torch.equal(marks["clip_fraction"], (first | second).double())


def test_cispo_clips_weights_and_keeps_every_gradient() -> None:
    columns = columns_of("cispo")
    _, marks, gradient = apply("cispo", columns)
    ratio = torch.exp(columns["new"] - columns["old"])
    assert torch.equal(marks["clip_fraction"], ((ratio < 0.7) | (ratio > 1.4)).double())
    assert marks["clip_fraction"].any()
    assert torch.equal(gradient == 0, columns["advantages"] == 0)
    _, unbounded, _ = apply("cispo", columns, {"clip_high": 100.0})
    assert not unbounded["clip_fraction"].any()  # by default there is no lower bound


def test_the_gate_of_sapo_is_the_slope_of_its_objective() -> None:
    columns = columns_of("sapo") | {"weights": torch.ones(sum(LENGTHS), dtype=torch.float64)}
    _, marks, gradient = apply("sapo", columns)
    ratio = torch.exp(columns["new"] - columns["old"])
    torch.testing.assert_close(gradient, -marks["gate"] * ratio * columns["advantages"])
    tau = torch.where(columns["advantages"] > 0, torch.tensor(2.0), torch.tensor(3.5))
    torch.testing.assert_close(marks["gate"], torch.cosh(tau / 2 * (ratio - 1)) ** -2)


@pytest.mark.parametrize("kind", RATIO_KINDS)
def test_policy_kl_is_of_tokens(kind: str) -> None:
    columns = columns_of(kind)
    drift = columns["new"] - columns["old"]
    torch.testing.assert_close(apply(kind, columns)[1]["policy_kl"], torch.exp(drift) - 1 - drift)


def test_nll_looks_at_the_log_probs_alone() -> None:
    columns = columns_of("nll")
    losses, marks, gradient = apply("nll", columns)
    assert torch.equal(gradient, -columns["weights"])
    assert torch.equal(losses, -columns["new"])
    assert torch.equal(marks["nll"], losses)


@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_marks_are_of_tokens_and_carry_no_gradient(kind: str) -> None:
    columns = columns_of(kind, torch.float32)
    losses, marks, _ = apply(kind, columns)
    for column in (losses, *marks.values()):
        assert column.shape == columns["new"].shape
        assert column.dtype == torch.float32
        assert not column.requires_grad


@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_one_token_responses_alone_are_those_of_a_batch(kind: str) -> None:
    columns = columns_of(kind)
    whole = apply(kind, columns)[0]
    alone = {name: column[:1] for name, column in columns.items()}
    assert LENGTHS[0] == 1
    torch.testing.assert_close(apply(kind, alone)[0], whole[:1])


def test_gspo_of_responses_of_one_token_is_ppo() -> None:
    columns = columns_of("ppo_clip") | {"sequences": torch.arange(sum(LENGTHS))}
    options = CASES["ppo_clip"].options
    for ours, theirs in zip(apply("gspo", columns, options), apply("ppo_clip", columns, options), strict=True):
        torch.testing.assert_close(ours, theirs)


LOG_PROBS = st.floats(-1e4, 0.0, width=32)
TOKENS = st.tuples(LOG_PROBS, LOG_PROBS, st.sampled_from([0.0, 1.0, -1.0]) | st.floats(-1e3, 1e3, width=32))


@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("kind", sorted(LOSSES))
@given(responses=st.lists(st.lists(TOKENS, min_size=1, max_size=5), max_size=5), data=st.data())
def test_any_columns_stay_finite_and_parts_equal_the_whole(
    kind: str, responses: list[list[tuple[float, float, float]]], data: st.DataObject
) -> None:
    lengths = [len(response) for response in responses]
    rows = torch.tensor([token for response in responses for token in response]).reshape(-1, 3)
    columns = dict(zip(("new", "old", "advantages"), rows.unbind(1), strict=True))
    columns |= {"weights": torch.linspace(1, 2, len(rows)), "sequences": sequences_of(lengths)}
    losses, marks, gradient = apply(kind, columns)
    for column in (losses, gradient, *marks.values()):
        assert column.shape == (len(rows),)
        assert torch.isfinite(column).all()
    if kind not in ("nll", "gspo"):
        assert not gradient[columns["advantages"] == 0].any()

    first = data.draw(st.integers(0, len(responses)))
    cut = sum(lengths[:first])
    pieces = []
    for part, number in ((slice(cut), 0), (slice(cut, None), first)):
        piece = {name: column[part] for name, column in columns.items()}
        piece["sequences"] = piece["sequences"] - number
        piece_losses, piece_marks, piece_gradient = apply(kind, piece)
        pieces.append({"loss": piece_losses, "gradient": piece_gradient, **piece_marks})
    for name, column in {"loss": losses, "gradient": gradient, **marks}.items():
        torch.testing.assert_close(torch.cat([piece[name] for piece in pieces]), column)


@pytest.mark.parametrize("kind", ["ppo_clip", "dual_clip", "sapo"])
def test_a_token_far_off_policy_moves_nothing(kind: str) -> None:
    log_probs = torch.tensor([-1.0, -1e4, -1.0, -torch.inf, -1.0], requires_grad=True)
    old = torch.tensor([-1e4, -1.0, -1e4, -1.0, -1.0])
    advantages = torch.tensor([1.0, -1.0, -1.0, 0.0, 2.0])
    losses, marks = LOSSES[kind](log_probs, old, advantages, torch.zeros(5, dtype=torch.int64))
    losses.sum().backward()
    assert all(torch.isfinite(column).all() for column in (losses, *marks.values()))
    assert log_probs.grad.tolist() == [0.0, 0.0, 0.0, 0.0, -2.0]


@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_columns_are_never_broadcast(kind: str) -> None:
    for short in range(4):
        columns = [torch.zeros(4), torch.zeros(4), torch.zeros(4), torch.zeros(4, dtype=torch.int64)]
        columns[short] = columns[short][:1]
        with pytest.raises(ValueError, match=r"unequal shape: .*\(1,\)"):
            LOSSES[kind](*columns)


# ---------------------------------------------------------------------- options


def scaled(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, sequences: Tensor, *, scale: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """A user's objective."""
    return -scale * advantages * log_probs, {}


def test_published_defaults() -> None:
    defaults = {
        kind: {p.name: p.default for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY}
        for kind, loss in LOSSES.items()
    }
    assert defaults == {
        "ppo_clip": {"clip_low": 0.2, "clip_high": 0.2},
        "dual_clip": {"clip_low": 0.2, "clip_high": 0.2, "clip_c": 3.0},
        "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
        "cispo": {"clip_low": 1.0, "clip_high": 4.0},
        "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
        "nll": {},
    }


@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_good_options_pass_and_every_bad_value_is_named(kind: str) -> None:
    check_loss_options(kind, {})
    check_loss_options(kind, CASES[kind].options)
    for name in CASES[kind].options:
        for value in (0, -0.1, math.inf, math.nan, "0.2", True, None):
            with pytest.raises(ConfigError, match=rf"algorithm\.loss\.options\.{name} is .*; use a finite number"):
                check_loss_options(kind, {name: value})


def test_mistakes_in_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'ppo_clip'"):
        check_loss_options("ppo_clips", {})
    with pytest.raises(ConfigError, match=r"options of ppo_clip: unknown 'clip_hight'; did you mean 'clip_high'"):
        check_loss_options("ppo_clip", {"clip_hight": 0.2})
    with pytest.raises(ConfigError, match="unknown 'clip_low'; known: none"):
        check_loss_options("nll", {"clip_low": 0.2})
    with pytest.raises(ConfigError, match=r"clip_c is 1; use a finite number over 1"):
        check_loss_options("dual_clip", {"clip_c": 1})


def test_a_users_objective_is_taken_by_its_name() -> None:
    check_loss_options("tests.test_losses:scaled", {"scale": 2.0})
    with pytest.raises(ConfigError, match="did you mean 'scale'"):
        check_loss_options("tests.test_losses:scaled", {"scales": 2.0})
    with pytest.raises(ConfigError, match="is a tuple, not a function"):
        check_loss_options("tests.test_losses:LENGTHS", {})
