"""Weights by Hugging Face name: every rule is a bit-exact round trip, and a parallel model gives back what it took."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlrl.backends import build_backend
from megatron_vlrl.backends.megatron import weights as weights_module
from megatron_vlrl.backends.megatron.names import GatedMLP, Replicated, Rule, rules
from megatron_vlrl.backends.megatron.weights import check_complete
from megatron_vlrl.errors import ModelError
from megatron_vlrl.models.hf_files import HFWeights
from megatron_vlrl.models.qwen3_vl.names import hf_shapes
from tests.reference import backend_options, renderer_and_sampling
from tests.spawn import run_ranks
from tests.spec import SPEC
from tests.tiny import make_tiny

# Everything divides by 4, and there are more queries than keys; untied, so that the head has a rule of its own.
WIDE = replace(SPEC, text=replace(SPEC.text, heads=8, kv_heads=4), tied_embeddings=False)
RULES = {rule.local: rule for rule in rules(WIDE)}
ONE_OF_A_KIND = [name for name in RULES if not any(f".{number}." in name for number in (1, 2, 3))]


def numbered(rule: Rule) -> list[torch.Tensor]:
    """Its whole tensors, no two elements alike."""
    shapes = [hf_shapes(WIDE)[name] for name in rule.hf]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    parts = torch.arange(sum(sizes), dtype=torch.float64).split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_a_rule_shards_and_joins_bit_for_bit(name: str, size: int) -> None:
    rule = RULES[name]
    whole = numbered(rule)
    shards = [rule.layout.shard(whole, rank, size) for rank in range(size)]
    joined = rule.layout.join(shards, [tuple(tensor.shape) for tensor in whole])
    assert len(joined) == len(whole)
    for got, expected in zip(joined, whole, strict=True):
        assert torch.equal(got, expected)
    # Shards part the elements among them, or are each the whole.
    values = torch.cat([shard.flatten() for shard in shards])
    copies = size if isinstance(rule.layout, Replicated) else 1
    assert len({shard.shape for shard in shards}) == 1
    assert len(values) == copies * sum(tensor.numel() for tensor in whole)
    assert len(values.unique()) * copies == len(values)


def test_every_tensor_has_one_rule() -> None:
    names = [name for rule in rules(WIDE) for name in rule.hf]
    assert sorted(names) == sorted(hf_shapes(WIDE))


def test_heads_stay_together_with_their_keys_and_values() -> None:
    rule = RULES["language_model.decoder.layers.0.self_attention.linear_qkv.weight"]
    q, k, v = numbered(rule)
    shard = rule.layout.shard([q, k, v], 1, 4)
    size = WIDE.text.head_dim
    # Key/value head 1 serves queries 2 and 3.
    assert torch.equal(shard, torch.cat([q[2 * size : 4 * size], k[size : 2 * size], v[size : 2 * size]]))


def test_each_rank_holds_its_gate_before_its_up() -> None:
    gate, up = torch.arange(8.0).view(8, 1), 10 + torch.arange(8.0).view(8, 1)
    assert GatedMLP().shard([gate, up], 1, 2).flatten().tolist() == [4, 5, 6, 7, 14, 15, 16, 17]


def test_vision_heads_are_cut_out_of_the_fused_matrix() -> None:
    rule = RULES["vision_model.layers.0.self_attention.linear_qkv.bias"]
    (fused,) = numbered(rule)
    width, size = WIDE.vision.hidden_size, WIDE.vision.hidden_size // WIDE.vision.heads
    expected = [fused[part * width + 3 * size : part * width + 4 * size] for part in range(3)]
    assert torch.equal(rule.layout.shard([fused], 3, 4), torch.cat(expected))


def exported(first: Path, second: Path, parallel: dict[str, int]) -> dict[str, Any]:
    """Built from `first`, loaded with `second`: what hf_weights gives, in one bucket and in tiny ones."""
    _, sampling = renderer_and_sampling(first)
    backend = build_backend(backend_options(first, sampling, **parallel))
    before = [name for name, _ in backend.hf_weights()]
    backend.load_hf(second)
    whole = [(name, weight.clone()) for name, weight in backend.hf_weights()]
    weights_module.BUCKET_BYTES = 1
    pieces = list(backend.hf_weights())
    tied = backend.weights.parameters.get("language_model.output_layer.weight")
    backend.close()
    return {"before": before, "whole": whole, "pieces": pieces, "head": None if tied is None else tied.detach()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, Path]]:
    """tied or not -> two models of one shape and different weights."""
    return {
        tied: tuple(make_tiny(tmp_path_factory.mktemp("model"), tied=tied, seed=seed) for seed in (0, 1))
        for tied in (True, False)
    }


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("degree", ["tensor", "pipeline"])
def test_a_parallel_model_gives_back_the_weights_it_took(
    degree: str, tied: bool, folders: dict[bool, tuple[Path, Path]]
) -> None:
    first, second = folders[tied]
    expected = dict(HFWeights(second).items())
    ranks = run_ranks(exported, 2, first, second, {degree: 2})
    for rank in ranks:
        names = [name for name, _ in rank["whole"]]
        assert names == rank["before"] == ranks[0]["before"]
        assert sorted(names) == sorted(expected)
        for kind in ("whole", "pieces"):
            assert [name for name, _ in rank[kind]] == names
            for name, weight in rank[kind]:
                assert weight.dtype == expected[name].dtype
                assert torch.equal(weight, expected[name]), name
    if tied and degree == "pipeline":
        # The last stage's copy of the tied table follows too.
        assert torch.equal(ranks[1]["head"], expected["model.language_model.embed_tokens.weight"])


def test_weights_that_do_not_fit_are_all_listed(tmp_path: Path, folders: dict[bool, tuple[Path, Path]]) -> None:
    folder = folders[True][0]
    tensors = load_file(folder / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_complete(HFWeights(folder), shapes)
    gone = [name for name in tensors if name.endswith("layers.2.mlp.up_proj.weight")]
    tensors["model.stranger"] = torch.zeros(2)
    for name in gone:
        del tensors[name]
    wrong = "model.visual.patch_embed.proj.bias"
    tensors[wrong] = tensors[wrong][1:].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        check_complete(HFWeights(tmp_path), shapes)
    text = str(caught.value)
    assert f"missing {gone}" in text
    assert "extra ['model.stranger']" in text
    assert f"misshapen ['{wrong} is [31], expected [32]']" in text
