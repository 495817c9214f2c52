"""What a group costs, who computes it and what shares a microbatch: measured against counted FLOPs and all splits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlrl.models.qwen3_vl.cost import UnitCosts, group_cost, unit_costs
from megatron_vlrl.models.qwen3_vl.sizes import SIZES, parameter_counts
from megatron_vlrl.packing.balance import THRESHOLD, cut, loads, longest_first, rebalance
from tests.groups import make_group

NOTHING = UnitCosts(token=0, pair=0, logit=0, patch=0, patch_pair=0)


@st.composite
def held_groups(draw: st.DrawFn, most: int = 40) -> tuple[np.ndarray, np.ndarray, int]:
    """Costs, the ranks that hold them, and the number of ranks; equal and very uneven costs included."""
    ranks = draw(st.integers(1, 6))
    cost = st.one_of(st.integers(1, 4).map(float), st.floats(1e-3, 1e15))
    costs = draw(st.lists(cost, max_size=most))
    owners = draw(st.lists(st.integers(0, ranks - 1), min_size=len(costs), max_size=len(costs)))
    return np.array(costs, dtype=np.float64), np.array(owners, dtype=np.int64), ranks


@settings(max_examples=200, deadline=None)
@given(held=held_groups())
def test_what_moves_helps_by_more_than_the_threshold(held: tuple[np.ndarray, np.ndarray, int]) -> None:
    costs, owners, ranks = held
    result = rebalance(costs, owners, ranks)
    before, after = loads(costs, owners, ranks).max(), loads(costs, result, ranks).max()
    fresh = loads(costs, longest_first(costs, owners, np.zeros(ranks)), ranks).max()
    assert after <= fresh * (1 + THRESHOLD) * (1 + 1e-12)
    assert set(result.tolist()) <= set(range(ranks))
    if np.array_equal(result, owners):
        assert after == before
    else:
        assert after < before
        assert before > fresh * (1 + THRESHOLD)


@settings(max_examples=100, deadline=None)
@given(held=held_groups())
def test_every_rank_finds_the_same_answer(held: tuple[np.ndarray, np.ndarray, int]) -> None:
    costs, owners, ranks = held
    first = rebalance(costs.copy(), owners.copy(), ranks)
    assert np.array_equal(first, rebalance(costs, owners, ranks))
    assert np.array_equal(first, rebalance(costs * 2.0, owners, ranks))  # the unit does not matter


@settings(max_examples=60, deadline=None)
@given(held=held_groups(most=6))
def test_longest_first_is_within_four_thirds_of_the_best_split(held: tuple[np.ndarray, np.ndarray, int]) -> None:
    costs, owners, ranks = held
    ranks = min(ranks, 3)
    splits = itertools.product(range(ranks), repeat=len(costs))
    best = min(loads(costs, np.array(split, dtype=np.int64), ranks).max() for split in splits)
    fresh = longest_first(costs, np.minimum(owners, ranks - 1), np.zeros(ranks))
    assert loads(costs, fresh, ranks).max() <= (4 / 3 - 1 / (3 * ranks)) * best * (1 + 1e-12)


def test_only_what_must_move_moves() -> None:
    costs = np.array([10.0, 9.0, 8.0, 7.0, 5.0, 5.0, 5.0, 5.0])
    owners = np.array([0, 1, 1, 0, 0, 0, 0, 1])  # 32 and 22
    moved = rebalance(costs, owners, 2)
    assert loads(costs, moved, 2).tolist() == [27, 27]
    assert np.flatnonzero(moved != owners).tolist() == [6]


def test_a_gain_under_the_threshold_moves_nothing() -> None:
    costs = np.array([50.0, 2.0, 48.0])
    near, far = np.array([0, 0, 1]), np.array([0, 1, 1])
    assert rebalance(costs, near, 2) is near  # 52 and 48 where 50 and 50 is possible
    assert rebalance(costs, near, 2, threshold=0.01).tolist() == far.tolist()


def test_one_rank_and_no_group_are_left_alone() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert rebalance(np.zeros(0), none, 3) is none
    alone = np.zeros(4, dtype=np.int64)
    assert rebalance(np.arange(1.0, 5.0), alone, 1) is alone


def test_uneven_answers_become_even() -> None:
    """16 ranks of 16 groups whose work spreads as answers' do: less than 2% above the mean, with few moves."""
    random = np.random.default_rng(0)
    costs, owners = random.lognormal(0, 0.8, 256), np.repeat(np.arange(16), 16)
    moved = rebalance(costs, owners, 16)
    assert loads(costs, owners, 16).max() > 1.3 * costs.sum() / 16
    assert loads(costs, moved, 16).max() < 1.02 * costs.sum() / 16
    assert (moved != owners).mean() < 0.25
    assert (longest_first(costs, owners, np.zeros(16)) != owners).mean() > 0.75  # from nothing, nearly all would


# ---------------------------------------------------------------- microbatches


@settings(max_examples=200, deadline=None)
@given(items=st.lists(st.tuples(st.integers(1, 50), st.floats(0.1, 100)), max_size=30), limit=st.integers(1, 60))
def test_cut_keeps_every_item_and_the_limit(items: list[tuple[int, float]], limit: int) -> None:
    tokens, costs = [item[0] for item in items], [item[1] for item in items]
    runs = cut(tokens, limit, costs)
    assert sorted(index for run in runs for index in run) == list(range(len(items)))
    assert runs == sorted(sorted(run) for run in runs)
    for run in runs:
        assert run
        assert len(run) == 1 or sum(tokens[index] for index in run) <= limit


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 200), limit=st.integers(1, 40))
def test_cut_of_equal_items_is_the_fewest_even_runs(count: int, limit: int) -> None:
    sizes = [len(run) for run in cut([3] * count, 3 * limit, [1.0] * count)]
    assert len(sizes) == -(-count // limit)
    assert max(sizes) - min(sizes) <= 1


def test_cut_examples() -> None:
    assert cut([], 10, []) == []
    assert cut([10] * 5, 40, [1.0] * 5) == [[0, 2, 4], [1, 3]]  # not 4 and 1
    assert cut([5, 99, 5], 10, [5, 99, 5]) == [[0, 2], [1]]  # one over the limit stands alone


def test_cut_is_even_in_cost_not_in_tokens() -> None:
    """Two with large images, four without, of equal tokens: the images part."""
    runs = cut([10] * 6, 40, [30.0, 30.0, 10.0, 10.0, 10.0, 10.0])
    assert [sum([30, 30, 10, 10, 10, 10][index] for index in run) for run in runs] == [50, 50]


# ---------------------------------------------------------------- what a group costs


def test_the_cost_of_a_group_counts_what_is_computed() -> None:
    """A prompt of 10 tokens with images of 4 and 36 patches, answers of 3 and 5."""
    group = make_group(0, [3, 5], prompt=10, grids=[2, 6])
    assert group_cost(group, replace(NOTHING, token=1)) == 18  # the prompt once
    assert group_cost(group, replace(NOTHING, pair=1)) == 50 + (3 * 10 + 4.5) + (5 * 10 + 12.5)
    assert group_cost(group, replace(NOTHING, logit=1)) == 1 + 2 + 4
    assert group_cost(group, replace(NOTHING, patch=1)) == 40
    assert group_cost(group, replace(NOTHING, patch_pair=1)) == 4**2 + 36**2
    frames = replace(group, prompt=replace(group.prompt, grids=((1, 2, 2), (9, 2, 2))))
    assert group_cost(frames, replace(NOTHING, patch_pair=1)) == 10 * 4**2  # frames do not look at each other


@pytest.mark.parametrize("name", SIZES)
def test_units_agree_with_the_published_sizes(name: str) -> None:
    """A token meets every weight of the layers once, but for experts it is not sent to."""
    spec, counts = SIZES[name], parameter_counts(SIZES[name])
    unit, text, vision = unit_costs(spec), SIZES[name].text, SIZES[name].vision
    idle = (text.experts - text.experts_per_token) * 3 * text.hidden_size * text.expert_ffn_size * text.layers
    assert unit.token / 2 == pytest.approx(counts["layers"] - idle, rel=2e-3)  # norms, biases
    table = vision.position_embeddings * vision.hidden_size  # looked up, not multiplied
    merged = vision.merge_size**2
    assert unit.patch / 2 == pytest.approx(counts["vision"] - table + counts["mergers"] / merged, rel=2e-3)
    assert unit.logit / 2 == (counts["embedding"] if spec.tied_embeddings else counts["head"])


def test_units_are_what_transformers_multiplies(tmp_path) -> None:
    """Every matrix product of a forward pass, counted; its attention computes whole squares, causal or not."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForImageTextToText

    from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
    from megatron_vlrl.models.qwen3_vl.render import Renderer
    from tests.tiny import make_tiny, sample

    folder = make_tiny(tmp_path, layers=3)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    unit = unit_costs(Qwen3VLSpec.load(folder))
    for images in ([(64, 64)], [(96, 64), (128, 128)]):
        prompt = Renderer(folder, 4096).render(sample(0, images))
        ids = torch.tensor([prompt.token_ids])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(
                input_ids=ids,
                pixel_values=torch.from_numpy(np.concatenate(prompt.patches)),
                image_grid_thw=torch.tensor(prompt.grids),
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
                logits_to_keep=5,
            )
        tokens, patches = len(prompt.token_ids), [h * w for _, h, w in prompt.grids]
        products = unit.token * tokens + unit.pair * tokens**2 + unit.logit * 5
        products += unit.patch * sum(patches) + unit.patch_pair * sum(n**2 for n in patches)
        assert counter.get_total_flops() == pytest.approx(products, rel=1e-6)
