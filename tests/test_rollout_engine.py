"""The transformers engine against full forward passes of a freshly loaded Hugging Face model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3VLForConditionalGeneration

from megatron_vlrl.errors import ModelError, RolloutError
from megatron_vlrl.models.qwen3_vl.render import Renderer
from megatron_vlrl.rollout.engines import decoding
from megatron_vlrl.rollout.engines.transformers import TransformersEngine
from megatron_vlrl.types import Prompt, RolloutGroup, Sampling
from tests.tiny import make_tiny, sample

IMAGES = (1, 0, [(64, 96), (128, 64)], [(160, 96)], 3, 0)  # several sizes, several images, none
TEXTS = ("How many digits?", "Read.", "Sum of the two digits?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), layers=3)


@pytest.fixture(scope="module")
def renderer(folder: Path) -> Renderer:
    return Renderer(folder, 512)


@pytest.fixture(scope="module")
def prompts(renderer: Renderer) -> list[Prompt]:
    return [
        renderer.render(sample(position=i, images=images, text=TEXTS[i % len(TEXTS)]))
        for i, images in enumerate(IMAGES)
    ]


@pytest.fixture
def engine(folder: Path, renderer: Renderer) -> TransformersEngine:
    return make_engine(folder, renderer)


def make_engine(folder: Path, renderer: Renderer, batch_prompts: int = 64) -> TransformersEngine:
    return TransformersEngine(folder, decode=renderer.decode, batch_prompts=batch_prompts, dtype="float32")


def sampling(
    renderer: Renderer, *, n: int = 3, temperature: float = 1.0, stops: Sequence[int] | None = None
) -> Sampling:
    """Many stop tokens by default: a random model then ends its responses at different places."""
    allowed = [i for i in range(384) if i not in renderer.banned_token_ids]
    return Sampling(
        n=n,
        temperature=temperature,
        max_new_tokens=12,
        stop_token_ids=tuple(allowed[::8]) if stops is None else tuple(stops),
        banned_token_ids=renderer.banned_token_ids,
        seed=5,
    )


def reference_logits(folder: Path, groups: Sequence[RolloutGroup]) -> list[list[torch.Tensor]]:
    """float32[R, V] before each response token, from one right-padded forward that finds its own MRoPE positions."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [(g.prompt, [*g.prompt.token_ids, *r.token_ids]) for g in groups for r in g.rollouts]
    ids = torch.zeros(len(rows), max(len(row) for _, row in rows), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, (_, row) in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    patches = [patch for prompt, _ in rows for patch in prompt.patches]
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            pixel_values=torch.from_numpy(np.concatenate(patches)),
            image_grid_thw=torch.tensor([grid for prompt, _ in rows for grid in prompt.grids]),
        ).logits
    starts = iter(logits)
    return [[next(starts)[len(g.prompt.token_ids) - 1 :][: len(r.token_ids)] for r in g.rollouts] for g in groups]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_a_full_forward(
    engine: TransformersEngine, folder: Path, renderer: Renderer, prompts: list[Prompt], temperature: float
) -> None:
    groups = engine.generate(prompts, sampling(renderer, temperature=temperature))
    for group, rows in zip(groups, reference_logits(folder, groups), strict=True):
        for rollout, logits in zip(group.rollouts, rows, strict=True):
            logits[:, list(renderer.banned_token_ids)] = -torch.inf
            assert rollout.temperature == temperature
            expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
            assert rollout.log_probs.dtype == np.float32
            assert np.abs(rollout.log_probs - expected.numpy()).max() < 1e-4


def test_greedy_is_the_argmax_of_a_full_forward(
    engine: TransformersEngine, folder: Path, renderer: Renderer, prompts: list[Prompt]
) -> None:
    groups = engine.generate(prompts, sampling(renderer, n=1, temperature=0.0))
    for group, (logits,) in zip(groups, reference_logits(folder, groups), strict=True):
        logits[:, list(renderer.banned_token_ids)] = -torch.inf
        rollout = group.rollouts[0]
        assert rollout.token_ids == tuple(logits.argmax(-1).tolist())
        assert rollout.temperature == 1.0
        assert np.abs(rollout.log_probs - logits.log_softmax(-1).amax(-1).numpy()).max() < 1e-4


def test_a_response_depends_on_neither_batch_nor_order_nor_compaction(
    folder: Path, renderer: Renderer, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = sampling(renderer)
    expected = make_engine(folder, renderer).generate(prompts, settings)
    assert len({r.token_ids for g in expected for r in g.rollouts}) > len(prompts)
    assert len({len(r.token_ids) for g in expected for r in g.rollouts}) > 3  # so that rows end, and are dropped, apart
    for batch in (1, 2, 4):
        same_groups(make_engine(folder, renderer, batch).generate(prompts, settings), expected)
    same_groups(make_engine(folder, renderer, 2).generate(prompts[::-1], settings)[::-1], expected)
    for share in (0.0, 1.0):  # never, and as soon as a row ends
        monkeypatch.setattr(decoding, "COMPACT_AT", share)
        same_groups(make_engine(folder, renderer).generate(prompts, settings), expected)


def test_more_rollouts_leave_the_first_ones_as_they_were(
    engine: TransformersEngine, renderer: Renderer, prompts: list[Prompt]
) -> None:
    many = engine.generate(prompts, sampling(renderer, n=5))
    few = engine.generate(prompts, sampling(renderer, n=2))
    assert all(len(group.rollouts) == 5 for group in many)
    for a, b in zip(many, few, strict=True):
        assert [r.token_ids for r in a.rollouts[:2]] == [r.token_ids for r in b.rollouts]
    assert all(len({r.token_ids for r in group.rollouts}) > 1 for group in many)


def same_groups(found: Sequence[RolloutGroup], expected: Sequence[RolloutGroup]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.prompt is b.prompt
        for x, y in zip(a.rollouts, b.rollouts, strict=True):
            assert (x.token_ids, x.text, x.finish_reason) == (y.token_ids, y.text, y.finish_reason)
            assert np.allclose(x.log_probs, y.log_probs, atol=1e-4)


def test_a_stop_token_ends_a_response_and_is_not_in_its_text(
    engine: TransformersEngine, renderer: Renderer, prompts: list[Prompt]
) -> None:
    settings = sampling(renderer, n=6)
    rollouts = [r for g in engine.generate(prompts, settings) for r in g.rollouts]
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        stops = [i for i, token in enumerate(rollout.token_ids) if token in settings.stop_token_ids]
        if rollout.finish_reason == "stop":
            assert stops == [len(rollout.token_ids) - 1]
            assert rollout.text == renderer.decode(rollout.token_ids[:-1])
        else:
            assert stops == []
            assert len(rollout.token_ids) == settings.max_new_tokens
            assert rollout.text == renderer.decode(rollout.token_ids)


def test_banned_tokens_never_appear_however_likely(
    engine: TransformersEngine, renderer: Renderer, prompts: list[Prompt]
) -> None:
    banned = list(renderer.banned_token_ids)
    raised = engine._model.lm_head.register_forward_hook(
        lambda _m, _i, out: out.index_add(-1, torch.tensor(banned), torch.full((len(out), len(banned)), 80.0))
    )
    for temperature in (0.0, 1.0, 3.0):
        settings = sampling(renderer, n=4, temperature=temperature, stops=())
        for group in engine.generate(prompts, settings):
            for rollout in group.rollouts:
                assert not set(rollout.token_ids) & set(banned)
                assert (rollout.log_probs > -40).all()
    raised.remove()


def test_global_random_state_is_neither_used_nor_changed(
    folder: Path, renderer: Renderer, prompts: list[Prompt]
) -> None:
    def state() -> tuple[bytes, bytes, object]:
        return torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(), random.getstate()

    before = state()
    first = make_engine(folder, renderer).generate(prompts, sampling(renderer))
    assert state() == before
    torch.manual_seed(123)
    same_groups(make_engine(folder, renderer).generate(prompts, sampling(renderer)), first)


@pytest.mark.parametrize("tied", [True, False])
def test_handed_over_weights_are_those_that_write(
    tmp_path: Path, renderer: Renderer, prompts: list[Prompt], tied: bool
) -> None:
    old, new = (make_tiny(tmp_path / str(seed), tied=tied, layers=3, seed=seed) for seed in (1, 2))
    engine, settings = make_engine(old, renderer), sampling(renderer)
    before = engine.generate(prompts, settings)
    engine.update_weights(iter(load_file(new / "model.safetensors").items()), version=7)
    after = engine.generate(prompts, settings)
    same_groups(after, make_engine(new, renderer).generate(prompts, settings))
    assert [r.token_ids for g in before for r in g.rollouts] != [r.token_ids for g in after for r in g.rollouts]
    assert {r.weight_version for g in before for r in g.rollouts} == {0}
    assert {r.weight_version for g in after for r in g.rollouts} == {7}


def test_weights_that_do_not_fit_are_all_named_and_must_be_handed_over_again(
    engine: TransformersEngine, folder: Path, renderer: Renderer, prompts: list[Prompt]
) -> None:
    weights = load_file(folder / "model.safetensors")
    names = list(weights)
    faulty = {**weights, names[1]: weights[names[1]][None], "model.unknown.weight": torch.zeros(1)}
    del faulty[names[0]]
    with pytest.raises(RolloutError) as error:
        engine.update_weights(iter(faulty.items()), version=1)
    for expected in (f"{names[0]} is missing", f"{names[1]} is [1, ", "model.unknown.weight is extra", "version 1"):
        assert expected in str(error.value)
    with pytest.raises(RolloutError, match="did not finish"):
        engine.generate(prompts, sampling(renderer))
    engine.update_weights(iter(weights.items()), version=2)
    assert engine.generate(prompts[:1], sampling(renderer))[0].rollouts[0].weight_version == 2


def test_an_interrupted_update_leaves_the_engine_refusing(
    engine: TransformersEngine, folder: Path, renderer: Renderer, prompts: list[Prompt]
) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield next(iter(load_file(folder / "model.safetensors").items()))
        raise ConnectionError("sender died")

    with pytest.raises(ConnectionError):
        engine.update_weights(broken(), version=1)
    with pytest.raises(RolloutError, match="hand over all weights"):
        engine.generate(prompts, sampling(renderer))


def test_diverged_weights_are_an_error_not_a_response(
    engine: TransformersEngine, folder: Path, renderer: Renderer, prompts: list[Prompt]
) -> None:
    weights = load_file(folder / "model.safetensors")
    engine.update_weights(((name, weight * torch.nan) for name, weight in weights.items()), version=1)
    with pytest.raises(RolloutError, match="not finite"):
        engine.generate(prompts, sampling(renderer))


def test_bfloat16_weights_give_float32_log_probs_near_the_exact_ones(
    engine: TransformersEngine, folder: Path, renderer: Renderer, prompts: list[Prompt]
) -> None:
    half = TransformersEngine(folder, decode=renderer.decode, batch_prompts=64, dtype="bfloat16")
    settings = sampling(renderer, n=8, stops=range(0, 384, 2))  # ends early: most draws then agree
    pairs = [
        (a.log_probs, b.log_probs)
        for x, y in zip(engine.generate(prompts, settings), half.generate(prompts, settings), strict=True)
        for a, b in zip(x.rollouts, y.rollouts, strict=True)
        if a.token_ids == b.token_ids
    ]
    assert len(pairs) > 24
    assert all(b.dtype == np.float32 for _, b in pairs)
    gaps = np.concatenate([abs(a - b) for a, b in pairs])
    assert 1e-4 < gaps.max() < 0.5


def test_no_prompts_no_groups(engine: TransformersEngine, renderer: Renderer) -> None:
    assert engine.generate([], sampling(renderer)) == []


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path, folder: Path, renderer: Renderer) -> None:
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    del weights["model.language_model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.language_model\.norm\.weight"):
        make_engine(tmp_path, renderer)
    with pytest.raises(ModelError, match="does not exist"):
        make_engine(tmp_path / "nowhere", renderer)


def test_a_closed_engine_refuses(engine: TransformersEngine, renderer: Renderer, prompts: list[Prompt]) -> None:
    engine.close()
    with pytest.raises(RolloutError):
        engine.generate(prompts, sampling(renderer))
