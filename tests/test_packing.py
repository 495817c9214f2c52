"""Packed rows hold what the groups say, attention looks where it may; controls show the bite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlrl.packing import Microbatch, Segment, Targets, pack, packed_tokens, plan_attention
from megatron_vlrl.types import RolloutGroup
from tests.groups import make_group
from tests.reference import LENGTHS, TEMPERATURES, backend_options, hf_scores, make_groups, renderer_and_sampling
from tests.spawn import run_ranks
from tests.tiny import make_tiny

SHAPES = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4)), min_size=1, max_size=4
)


def groups_of(shapes: list[tuple[int, list[int]]]) -> list[RolloutGroup]:
    """Each at a temperature of its own."""
    groups = [make_group(number, lengths, prompt=prompt) for number, (prompt, lengths) in enumerate(shapes)]
    return [
        replace(group, rollouts=tuple(replace(rollout, temperature=0.5 + number) for rollout in group.rollouts))
        for number, group in enumerate(groups)
    ]


@settings(max_examples=60, deadline=None)
@given(shapes=SHAPES, multiple=st.sampled_from([1, 2, 4]))
def test_a_row_predicts_every_response_token_from_the_one_before(
    shapes: list[tuple[int, list[int]]], multiple: int
) -> None:
    groups = groups_of(shapes)
    row = pack(groups, multiple=multiple, pad_id=7)
    length = len(row.input_ids)
    used = sum(packed_tokens(group) for group in groups)
    assert length % multiple == 0
    assert used <= length < used + multiple

    token = 0
    for group, segment in zip(groups, row.segments, strict=False):
        begin, end = segment.prompt
        assert tuple(row.input_ids[begin:end].tolist()) == group.prompt.token_ids
        np.testing.assert_array_equal(row.positions[:, begin:end], group.prompt.positions)
        for rollout, (first, last) in zip(group.rollouts, segment.responses, strict=True):
            assert tuple(row.input_ids[first:last].tolist()) == rollout.token_ids
            expected = group.prompt.positions.max() + 1 + np.arange(last - first)
            np.testing.assert_array_equal(row.positions[:, first:last], np.stack([expected] * 3))
            source = row.source[token : token + last - first]
            assert row.logit_rows[source].tolist() == [end - 1, *range(first, last - 1)]
            assert set(row.temperatures[source].tolist()) == {rollout.temperature}
            assert tuple(row.target_ids[token : token + last - first].tolist()) == rollout.token_ids
            token += last - first
    assert token == len(row.target_ids) == sum(row.lengths)
    assert row.lengths == tuple(len(rollout.token_ids) for group in groups for rollout in group.rollouts)
    # Each row of logits is asked for once and is used by some token.
    assert len(row.logit_rows.unique()) == len(row.logit_rows) == len(row.temperatures)
    assert set(row.source.tolist()) == set(range(len(row.logit_rows)))

    borders = [place for segment in row.segments for place in (segment.prompt, *segment.responses)]
    assert [0, *(end for _, end in borders)] == [*(begin for begin, _ in borders), length]
    assert len(row.segments) == len(groups) + (length > used)
    if length > used:
        assert row.segments[-1] == Segment(prompt=(used, length), responses=())
        assert set(row.input_ids[used:].tolist()) == {7}
        assert int(row.logit_rows.max()) < used


def test_images_stand_in_the_order_of_their_groups() -> None:
    groups = [make_group(0, [2], grids=(2, 4)), make_group(1, [1]), make_group(2, [3], grids=(4,))]
    row = pack(groups)
    assert row.grids == ((1, 2, 2), (1, 4, 4), (1, 4, 4))
    expected = [patch for group in groups for patch in group.prompt.patches]
    np.testing.assert_array_equal(row.patches.numpy(), np.concatenate(expected))
    assert pack(groups[1:2]).patches.numel() == 0


def test_targets_must_fit_the_row() -> None:
    row = pack([make_group(0, [2, 3])])
    short = torch.zeros(4)
    targets = Targets(
        rollout_log_probs=short,
        advantages=short,
        weights=short,
        entropy_weights=short,
        kl_weights=short,
        task=short.long(),
        counted=short,
        fresh=short,
    )
    with pytest.raises(ValueError, match="4 tokens, the row has 5"):
        row.with_targets(targets)


def allowed(segments: tuple[Segment, ...], length: int) -> torch.Tensor:
    """bool[T, T], by the definition: a token sees its prompt, and of its own part what is not after it."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for segment in segments:
        begin, end = segment.prompt
        mask[begin:end, begin:end] = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
        for first, last in segment.responses:
            mask[first:last, begin:end] = True
            mask[first:last, first:last] = torch.ones(last - first, last - first, dtype=torch.bool).tril()
    return mask


@settings(max_examples=40, deadline=None)
@given(shapes=SHAPES, multiple=st.sampled_from([1, 4]))
def test_planned_attention_equals_a_masked_square(shapes: list[tuple[int, list[int]]], multiple: int) -> None:
    from megatron_vlrl.backends.megatron.layers import PackedRowAttention

    row = pack(groups_of(shapes), multiple=multiple)
    length = len(row.input_ids)
    generator = torch.Generator().manual_seed(length)
    parts = [
        torch.randn(length, heads, 6, dtype=torch.float64, generator=generator).requires_grad_() for heads in (4, 2, 2)
    ]
    query, key, value = parts
    attention = PackedRowAttention(SimpleNamespace())
    got = attention(query, key, value, packed_seq_params=SimpleNamespace(plan=plan_attention(row.segments)))

    keys, values = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, keys) / 6**0.5
    weights = scores.masked_fill(~allowed(row.segments, length), -torch.inf).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", weights, values).flatten(1)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)

    direction = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    for mine, theirs in zip(
        torch.autograd.grad((got * direction).sum(), parts),
        torch.autograd.grad((expected * direction).sum(), parts),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


def test_a_row_of_prompts_alone_is_planned() -> None:
    plan = plan_attention([Segment(prompt=(0, 2), responses=()), Segment(prompt=(2, 5), responses=())])
    assert plan.owner.tolist() == []
    assert plan.prompt_index.tolist() == [[0, 1, 1], [2, 3, 4]]
    assert plan.unpack.tolist() == [0, 1, 3, 4, 5]


def running_positions(row: Microbatch, groups: list[RolloutGroup]) -> Microbatch:
    """Responses numbered one after the other, as if they were one text."""
    positions = row.positions.clone()
    for group, segment in zip(groups, row.segments, strict=False):
        following = int(group.prompt.positions.max()) + 1
        begin, end = segment.responses[0][0], segment.responses[-1][1]
        positions[:, begin:end] = following + torch.arange(end - begin)
    return replace(row, positions=positions)


def responses_see_each_other(row: Microbatch) -> Microbatch:
    """Each group's responses as one long response."""
    segments = [
        replace(segment, responses=((segment.responses[0][0], segment.responses[-1][1]),) if segment.responses else ())
        for segment in row.segments
    ]
    return replace(row, segments=tuple(segments))


def log_prob_errors(folder: Path) -> dict[str, list[float]]:
    """Greatest error of each response's log-probs against transformers: the row as packed, and three wrong ones; and
    of the packed row's against those of each group in a row of its own."""
    from megatron_vlrl.backends import build_backend

    renderer, sampling = renderer_and_sampling(folder)
    groups = make_groups(renderer)
    expected, _, _ = hf_scores(folder, groups, sampling)
    backend = build_backend(backend_options(folder, sampling))
    row = pack(groups, multiple=2)
    rows = {
        "packed": row,
        "running positions": running_positions(row, groups),
        "seen by others": responses_see_each_other(row),
        "at temperature 1": replace(row, temperatures=torch.ones_like(row.temperatures)),
    }
    errors = {}
    for name, wrong in rows.items():
        differences = (backend.score([wrong])[0].log_probs - expected.detach()).abs()
        errors[name] = [float(part.max()) for part in differences.split(list(row.lengths))]
    alone = torch.cat([score.log_probs for score in backend.score([pack([group], multiple=2) for group in groups])])
    errors["alone"] = [float((backend.score([row])[0].log_probs - alone).abs().max())]
    backend.close()
    return errors


def test_wrong_rows_do_not_pass_for_right_ones(tmp_path: Path) -> None:
    (errors,) = run_ranks(log_prob_errors, 1, make_tiny(tmp_path))
    assert max(errors["packed"]) < 1e-4
    assert max(errors["alone"]) < 1e-5
    # A group's first response is right either way, and so is a single token after the prompt's end.
    lengths = [length for group in LENGTHS for length in group]
    first = {sum(len(group) for group in LENGTHS[:number]) for number in range(len(LENGTHS))}
    for name in ("running positions", "seen by others"):
        for number, error in enumerate(errors[name]):
            if number in first or lengths[number] == 1:
                assert error < 1e-4, (name, number)
            else:
                assert error > 1e-3, (name, number)
    of_group = [TEMPERATURES[number % 3] for number, group in enumerate(LENGTHS) for _ in group]
    for temperature, error in zip(of_group, errors["at temperature 1"], strict=True):
        assert error < 1e-4 if temperature == 1.0 else error > 1e-3, (temperature, error)
