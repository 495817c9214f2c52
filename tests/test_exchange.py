"""Groups that change ranks over real gloo processes arrive whole, and the update is the one that one process makes."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vlrl.algorithms import advantages
from megatron_vlrl.config.schema import AlgorithmConfig, LossConfig
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.models.qwen3_vl.cost import group_cost, unit_costs
from megatron_vlrl.packing import packed_tokens
from megatron_vlrl.parallel.collectives import exchange_objects, world_group
from megatron_vlrl.parallel.groups import Group
from megatron_vlrl.train.exchange import share_out
from megatron_vlrl.train.minibatches import Minibatch, assign, make_minibatches, trains
from megatron_vlrl.train.rewards import gather_table
from megatron_vlrl.train.update import Updater
from megatron_vlrl.types import RewardBreakdown, RolloutGroup, ScoredGroup
from tests.groups import make_group
from tests.reference import at_rate, backend_options, make_groups, relative, renderer_and_sampling
from tests.spawn import run_ranks
from tests.tiny import make_tiny

TASKS = ("count", "read")
# position -> response lengths; what rank 0 of two holds comes first, and is most of the work
UNEVEN = [[90, 5], [60, 61], [40, 3, 7], [2, 2], [1, 4], [3, 2]]
HELD = [[0, 1, 2], [3, 4, 5]]
ALGORITHM = AlgorithmConfig(loss=LossConfig(importance="none"))


def test_one_process_keeps_what_it_has() -> None:
    groups = [make_group(position, lengths) for position, lengths in enumerate(UNEVEN)]
    shares = share_out(groups[::-1], dict.fromkeys(range(5), 0), packed_tokens, Group.single())
    assert list(shares.groups) == groups[:5]  # position 5 does not train
    assert shares.scalars() == {"balance/before": 1.0, "balance/after": 1.0}
    nothing = share_out(groups, {}, packed_tokens, Group.single())
    assert (nothing.groups, nothing.before, nothing.after) == ((), 1.0, 1.0)


# ---------------------------------------------------------------- what arrives


def swap_sizes() -> list[Any]:
    """Each rank sends the others arrays of several megabytes, of none, and two in a row to the next."""
    group = world_group()
    following = (group.rank + 1) % group.size
    outgoing = {
        rank: [np.full(10**6 * rank, group.rank, np.float32)] for rank in range(group.size) if rank != group.rank
    }
    outgoing[following].append(f"{group.rank} to {following}")
    arrived = exchange_objects(outgoing, group)
    return [value if isinstance(value, str) else (len(value), set(value.tolist())) for value in arrived]


def test_objects_arrive_at_their_receiver_in_the_order_of_their_senders() -> None:
    zero, one, two = run_ranks(swap_sizes, 3)
    assert zero == [(0, set()), (0, set()), "2 to 0"]
    assert one == [(10**6, {0.0}), "0 to 1", (10**6, {2.0})]
    assert two == [(2 * 10**6, {0.0}), (2 * 10**6, {1.0}), "1 to 2"]


def same(ours: RolloutGroup, theirs: RolloutGroup) -> bool:
    """To the last bit, pixels and log-probs included."""
    return pickle.dumps(pickle.loads(pickle.dumps(ours))) == pickle.dumps(pickle.loads(pickle.dumps(theirs)))


def shared(held: Sequence[Sequence[int]], minibatches: int) -> tuple[list[int], bool, float, float, list[Minibatch]]:
    """Positions after the balance, whether they are as made, the figures, and the minibatches made of them."""
    data = world_group()
    made = [make_group(number, lengths, grids=[2 * number]) for number, lengths in enumerate(UNEVEN)]
    own = [made[position] for position in held[data.rank]]
    chosen = {position: position % minibatches for position in range(len(UNEVEN))}
    shares = share_out(own, chosen, packed_tokens, data)
    rewards = [
        tuple(RewardBreakdown(components={}, weights={}, total=float(n)) for n, _ in enumerate(group.rollouts))
        for group in own
    ]
    scored = [ScoredGroup(group=group, rewards=each) for group, each in zip(own, rewards, strict=True)]
    table = gather_table(scored, data, TASKS)
    result = advantages(table.total, table.task, table.position, "grpo", table.components)
    rows = trains(table, result, every_token=False)
    parts = make_minibatches(
        shares.groups, table, result, moving=rows, chosen=chosen, aggregation="token_mean", constant=1
    )
    positions = [group.prompt.sample.position for group in shares.groups]
    whole = all(same(group, made[position]) for group, position in zip(shares.groups, positions, strict=True))
    return positions, whole, shares.before, shares.after, parts


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_group_that_moved_is_whole_and_keeps_its_advantages_and_weights(minibatches: int) -> None:
    """Three ranks, of which the last holds nothing before."""
    ((*_, alone),) = run_ranks(shared, 1, [list(range(6))], minibatches)
    expected = [{member.group.prompt.sample.position: member for member in part.groups} for part in alone]
    results = run_ranks(shared, 3, [*HELD, []], minibatches)
    assert sorted(position for held, *_ in results for position in held) == list(range(len(UNEVEN)))
    assert all(held for held, *_ in results)
    assert len({(before, after) for _, _, before, after, _ in results}) == 1
    _, _, before, after, _ = results[0]
    assert before > 2.5
    assert 1.0 <= after < before
    for held, whole, _, _, parts in results:
        assert whole
        assert sorted(m.group.prompt.sample.position for part in parts for m in part.groups) == held
        for part, reference, of_all in zip(parts, expected, alone, strict=True):
            assert part.trained == of_all.trained
            for member in part.groups:
                theirs = reference[member.group.prompt.sample.position]
                assert np.array_equal(member.advantages, theirs.advantages)
                assert np.array_equal(member.weights, theirs.weights)


# ---------------------------------------------------------------- the update


def updates(folder: Path, parallel: dict[str, int], held: Sequence[Sequence[int]], balance: Sequence[bool]) -> Any:
    """Gradients, sums and the numbers of groups on this rank, with and without the balance."""
    from megatron_vlrl.backends import build_backend

    renderer, sampling = renderer_and_sampling(folder)
    images = [[(128, 128)], [(64, 64)], [], [], [(64, 96)], []]
    groups = [
        replace(group, rollouts=tuple(replace(one, log_probs=one.log_probs - 5.5) for one in group.rollouts))
        for group in make_groups(renderer, images, UNEVEN, [TASKS[number % 2] for number in range(len(UNEVEN))])
    ]
    backend = build_backend(backend_options(folder, sampling, **parallel))
    data = backend.groups.data
    cost = partial(group_cost, unit=unit_costs(Qwen3VLSpec.load(folder)))
    updater = Updater(
        backend=backend,
        task_names=TASKS,
        microbatch_tokens=160,
        cost=cost,
    )
    own = [groups[position] for position in held[data.rank]]
    rewards = [
        tuple(RewardBreakdown(components={}, weights={}, total=float(n % 2)) for n, _ in enumerate(group.rollouts))
        for group in own
    ]
    scored = [ScoredGroup(group=group, rewards=each) for group, each in zip(own, rewards, strict=True)]
    table = gather_table(scored, data, TASKS)
    result = advantages(table.total, table.task, table.position, "grpo", table.components)
    rows = trains(table, result, every_token=False)
    chosen = assign(table, rows, 1, (0,))
    results = []
    for balanced in balance:
        mine = share_out(own, chosen, cost, data).groups if balanced else own
        (part,) = make_minibatches(
            mine, table, result, moving=rows, chosen=chosen, aggregation="sequence_mean", constant=1
        )
        (batches,) = updater.prepare([part.groups], ALGORITHM, version=0)
        update = updater.update(batches, ALGORITHM, at_rate(0.0))
        gradients = torch.cat([gradient.flatten() for _, gradient in sorted(backend.hf_gradients())])
        results.append(
            (gradients.clone(), np.concatenate([np.ravel(value) for value in update.sums.values()]), len(part.groups))
        )
    backend.close()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"), layers=2)


def test_two_balanced_ranks_make_the_update_of_one_process(folder: Path) -> None:
    (((gradients, sums, _),),) = run_ranks(updates, 1, folder, {}, [list(range(6))], [False])
    assert float(gradients.norm()) > 1e-3
    ranks = run_ranks(updates, 2, folder, {"data": 2}, HELD, [False, True])
    assert [[count for _, _, count in rank] for rank in ranks] != [[3, 3], [3, 3]]  # something moved
    for rank in ranks:
        for theirs, their_sums, _ in rank:
            assert relative(theirs, gradients) < 1e-5
            np.testing.assert_allclose(their_sums, sums, rtol=1e-5, atol=1e-6)


def test_a_rank_without_groups_gets_some_and_one_left_without_takes_part(folder: Path) -> None:
    """First all groups are on one rank; then there is one group for two ranks."""
    (((gradients, _, _),),) = run_ranks(updates, 1, folder, {}, [list(range(6))], [False])
    ranks = run_ranks(updates, 2, folder, {"data": 2}, [[], list(range(6))], [True])
    assert all(count > 0 for ((_, _, count),) in ranks)
    assert all(relative(theirs, gradients) < 1e-5 for ((theirs, _, _),) in ranks)
    (((gradients, _, _),),) = run_ranks(updates, 1, folder, {}, [[1]], [False])
    ranks = run_ranks(updates, 2, folder, {"data": 2}, [[1], []], [True])
    assert [count for ((_, _, count),) in ranks] == [1, 0]
    assert all(relative(theirs, gradients) < 1e-5 for ((theirs, _, _),) in ranks)


@pytest.mark.slow
def test_every_rank_of_a_replica_takes_part_in_the_exchange(folder: Path) -> None:
    (((gradients, sums, _),),) = run_ranks(updates, 1, folder, {}, [list(range(6))], [False])
    ranks = run_ranks(updates, 4, folder, {"data": 2, "tensor": 2}, HELD, [True])
    counts = [count for ((_, _, count),) in ranks]
    assert counts[0] == counts[1] != 3  # tensor ranks of one replica hold the same groups
    assert counts[2] == counts[3] == 6 - counts[0]
    for ((theirs, their_sums, _),) in ranks:
        assert relative(theirs, gradients) < 1e-5
        assert their_sums == pytest.approx(sums, rel=1e-5, abs=1e-6)
