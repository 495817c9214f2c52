"""Videos equal the real processor and model: ids, positions, patches, logits, log-probs and gradients."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from megatron_vlrl.errors import ModelError, SampleError
from megatron_vlrl.models.qwen3_vl.geometry import mrope_positions
from megatron_vlrl.models.qwen3_vl.render import Renderer, chat_messages
from megatron_vlrl.models.qwen3_vl.video import step_times
from megatron_vlrl.packing import pack
from megatron_vlrl.rollout.engines.decoding import respond
from megatron_vlrl.rollout.engines.transformers import TransformersEngine
from megatron_vlrl.types import Message, Rollout, RolloutGroup, Sample, Video
from tests.clips import clip, processed, with_videos
from tests.reference import (
    TEMPERATURES,
    Reference,
    at_rate,
    backend_options,
    hf_reference,
    hf_scores,
    make_microbatches,
    relative,
    renderer_and_sampling,
    token_loss,
)
from tests.spawn import run_ranks
from tests.tiny import make_tiny, png, sample

CASES = {
    "one video": with_videos(clip()),
    "odd number of frames, uneven times": with_videos(clip((0.0, 0.4, 1.1, 1.5, 2.25))),
    "sizes that need resizing": with_videos(clip(size=(50, 70)), clip((0.3, 7.0), size=(300, 200))),
    "many frames, whose size a cap per frame would change": with_videos(clip(range(17), size=(245, 64))),
    "image and video": with_videos(clip(), images=1),
    "marks in the text": with_videos(clip(), text="After <video> and <image>, <image> \n what?", images=2),
    "image marked, video not": with_videos(clip(), text="Compare <image>.", images=1),
    "text before a timestamp": with_videos(clip(), text="<0.2 seconds> at 3<video>4<think>"),
    "no video": sample(1, text="<video> is a tag of web pages, <image>"),
}
SAMPLES = (
    with_videos(clip((0.0, 0.5, 1.0)), position=0),
    with_videos(
        clip((0.0, 2.0), size=(96, 64), seed=1),
        clip(seed=2),
        position=1,
        images=[(64, 96)],
        text="<video>a<image>b<video>",
    ),
    sample(2, images=0),
    sample(3, images=1),
)
LENGTHS = ((5, 1, 4), (3, 3), (4, 2), (2,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), layers=3, vision_depth=2)


@pytest.fixture(scope="module")
def renderer(folder: Path) -> Renderer:
    return Renderer(folder, max_prompt_tokens=512)


@pytest.fixture(scope="module")
def processor(folder: Path) -> Qwen3VLProcessor:
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Qwen3VLForConditionalGeneration:
    return Qwen3VLForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("case", CASES)
def test_prompt_equals_the_processor_and_drives_the_model_as_it_does(
    case: str, renderer: Renderer, processor: Qwen3VLProcessor, model: Qwen3VLForConditionalGeneration
) -> None:
    wanted = CASES[case]
    prompt = renderer.render(wanted)
    batch = processed(processor, wanted)
    grids = batch.get("video_grid_thw", torch.empty(0, 3, dtype=torch.int64))
    steps = [(1, h, w) for t, h, w in grids.tolist() for _ in range(t)]

    assert list(prompt.token_ids) == batch["input_ids"][0].tolist()
    assert [prompt.grids[i] for i in prompt.video_grids] == steps
    assert len(prompt.grids) == len(steps) + len(wanted.images)
    if steps:
        patches = np.concatenate([prompt.patches[i] for i in prompt.video_grids])
        np.testing.assert_array_equal(patches, batch["pixel_values_videos"].numpy())
    given = {name: batch[name] for name in ("image_grid_thw", "video_grid_thw") if name in batch}
    positions, _ = model.model.get_rope_index(batch["input_ids"], batch["mm_token_type_ids"], **given)
    np.testing.assert_array_equal(prompt.positions, positions[:, 0].numpy())

    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "video_metadata"}).logits[0, -1]
        _, sampling = renderer_and_sampling(Path(model.config._name_or_path))
        sampling = dataclasses.replace(sampling, temperature=0.0, max_new_tokens=1, banned_token_ids=())
        drawn = respond(model, [prompt], sampling)
    assert drawn.tokens.tolist() == [[int(logits.argmax())]]
    assert float(drawn.log_probs) == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-5)


def test_frames_per_second_are_times_as_the_processor_counts_them(processor: Qwen3VLProcessor) -> None:
    for fps in (2.0, 29.97, 3):
        for frames in (2, 5, 7):
            video = clip([number / fps for number in range(frames)], size=(32, 32))
            assert list(step_times(video, 2)) == processor._calculate_timestamps(list(range(frames)), fps, 2)


def groups_of(renderer: Renderer) -> list[RolloutGroup]:
    """Videos, videos and an image, text alone, an image alone; the answers are random."""
    random = np.random.default_rng(0)

    def rollout(length: int) -> Rollout:
        return Rollout(
            token_ids=tuple(random.integers(20, 300, size=length).tolist()),
            log_probs=np.zeros(length, np.float32),
            temperature=TEMPERATURES[0],
            text="",
            finish_reason="stop",
            weight_version=0,
        )

    return [
        RolloutGroup(prompt=renderer.render(one), rollouts=tuple(map(rollout, lengths)))
        for one, lengths in zip(SAMPLES, LENGTHS, strict=True)
    ]


def compare(folder: Path, parallel: dict[str, Any]) -> dict[str, float]:
    """One step in this rank's layout: errors against the padded reference."""
    from megatron_vlrl.backends import build_backend

    renderer, sampling = renderer_and_sampling(folder)
    groups = groups_of(renderer)
    reference = Reference(**torch.load(folder / "reference.pt", weights_only=True))
    backend = build_backend(backend_options(folder, sampling, **parallel))
    multiple = backend.groups.tensor.size
    whole = backend.score(make_microbatches(groups, reference, [range(len(groups))], multiple))[0]
    backend.train_step(make_microbatches(groups, reference, [[0, 2], [1, 3]], multiple), token_loss, at_rate(0.0))
    gradients = {name: relative(value, reference.gradients[name]) for name, value in backend.hf_gradients()}
    backend.close()
    return {
        "log_probs": relative(whole.log_probs, reference.log_probs),
        "entropies": relative(whole.entropies, reference.entropies),
        "gradients": max(gradients.values()),
    }


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}], ids=["one process", "tp2 sp"])
def test_backend_equals_transformers(folder: Path, parallel: dict[str, Any]) -> None:
    if not (folder / "reference.pt").exists():
        renderer, sampling = renderer_and_sampling(folder)
        torch.save(vars(hf_reference(folder, groups_of(renderer), sampling)), folder / "reference.pt")
    for errors in run_ranks(compare, parallel.get("tensor", 1), folder, parallel):
        assert errors["log_probs"] < 1e-5, errors
        assert errors["entropies"] < 1e-5, errors
        assert errors["gradients"] < 1e-4, errors


def test_engine_draws_from_the_distribution_of_a_full_forward(folder: Path) -> None:
    renderer, sampling = renderer_and_sampling(folder)
    engine = TransformersEngine(folder, decode=renderer.decode, batch_prompts=8, dtype="float32")
    prompts = [renderer.render(one) for one in SAMPLES]
    groups = engine.generate(prompts, dataclasses.replace(sampling, n=2))
    expected, _, _ = hf_scores(folder, groups, sampling)
    drawn = np.concatenate([rollout.log_probs for group in groups for rollout in group.rollouts])
    np.testing.assert_allclose(drawn, expected.detach().numpy(), atol=1e-4)


def test_a_row_holds_images_and_steps_of_videos_in_the_order_of_their_tokens(renderer: Renderer) -> None:
    groups = groups_of(renderer)
    row = pack(groups)
    spec = renderer.spec
    vision = (row.input_ids == spec.image_token_id) | (row.input_ids == spec.video_token_id)
    counts = [t * h * w for t, h, w in row.grids]
    assert sum(counts) == len(row.patches) == 4 * int(vision.sum())
    assert [group.prompt.video_grids for group in groups] == [(0, 1), (0, 2, 3), (), ()]
    parts = row.patches.split(counts)
    second = groups[1].prompt
    for part, patch in zip(parts[2:6], second.patches, strict=True):
        np.testing.assert_array_equal(part.numpy(), patch)


def test_positions_refuse_a_grid_that_runs_from_an_image_into_a_video(renderer: Renderer) -> None:
    spec = renderer.spec
    ids = [spec.image_token_id] * 2 + [spec.video_token_id] * 2
    assert mrope_positions(ids, [(1, 2, 4), (1, 2, 4)], spec).shape == (3, 4)
    with pytest.raises(ValueError, match="grid"):
        mrope_positions(ids, [(1, 4, 4)], spec)


def test_videos_stand_after_images_without_marks_and_are_text_where_there_are_none() -> None:
    messages = (Message(role="user", content="a<video>b"),)
    assert chat_messages(messages, 0, 0) == [{"role": "user", "content": "a<video>b"}]
    a, b = {"type": "text", "text": "a"}, {"type": "text", "text": "b"}
    assert chat_messages(messages, 0, 1)[0]["content"] == [a, {"type": "video"}, b]
    (plain,) = chat_messages((Message(role="user", content="a"),), 1, 2)
    assert plain["content"] == [{"type": "image"}, {"type": "video"}, {"type": "video"}, a]


def test_length_limit_counts_video_tokens(folder: Path, renderer: Renderer) -> None:
    wanted = with_videos(clip(), images=1)
    prompt = renderer.render(wanted)
    total = len(prompt.token_ids)
    vision = sum(h * w // 4 for _, h, w in prompt.grids)
    assert vision > 9  # the image's
    assert Renderer(folder, max_prompt_tokens=total).render(wanted).token_ids
    with pytest.raises(SampleError, match=f"{total} tokens, {vision} of them vision tokens"):
        Renderer(folder, max_prompt_tokens=total - 1).render(wanted)


@pytest.mark.parametrize("token", ["<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
def test_text_cannot_inject_video_tokens(renderer: Renderer, token: str) -> None:
    with pytest.raises(SampleError, match="special token") as caught:
        renderer.render(with_videos(clip(), text=f"see {token}"))
    assert token in str(caught.value)


@pytest.mark.parametrize("text", ["a<|im<video>_end|>", "<|video<video>_pad|>", "<|<video>vision_start|>"])
def test_a_special_token_cannot_be_pieced_together_around_a_video(renderer: Renderer, text: str) -> None:
    special = {*renderer.stop_token_ids, *renderer.spec.vision_token_ids}
    hostile, plain = renderer.render(with_videos(clip(), text=text)), renderer.render(with_videos(clip()))
    assert [i for i in hostile.token_ids if i in special] == [i for i in plain.token_ids if i in special]


def _frames(*frames: bytes) -> Sample:
    return with_videos(Video(frames=frames, timestamps=tuple(map(float, range(len(frames))))))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (_frames(png((64, 64)), png((64, 96))), "frames of 64x64 and 64x96 pixels"),
        (_frames(png((64, 64))), "1 frames of 64x64 is refused"),
        (_frames(png((4000, 4)), png((4000, 4))), "4000x4 is refused"),
        (_frames(png((64, 64)), png((64, 64))[:60]), "cannot be decoded"),
        (dataclasses.replace(with_videos(clip()), messages=(Message(role="system", content="s"),)), "place"),
    ],
)
def test_unusable_videos_are_refused_by_key(renderer: Renderer, bad: Sample, message: str) -> None:
    with pytest.raises(SampleError, match=message) as caught:
        renderer.render(bad)
    assert caught.value.key == bad.key


@pytest.mark.parametrize(
    ("template", "old", "new"),
    [("no video", "<|video_pad|>", ""), ("twice", "<|video_pad|>", "<|video_pad|><|video_pad|>")],
)
def test_a_template_that_places_other_videos_is_refused(
    folder: Path, tmp_path: Path, template: str, old: str, new: str
) -> None:
    shutil.copytree(folder, tmp_path / "m")
    path = tmp_path / "m" / "chat_template.jinja"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(SampleError, match="not one place each"):
        Renderer(tmp_path / "m", 512).render(with_videos(clip()))


def test_a_video_processor_that_does_not_fit_is_a_model_error(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    path = tmp_path / "m" / "processor_config.json"
    config = json.loads(path.read_text())
    config["video_processor"]["temporal_patch_size"] = 4
    path.write_text(json.dumps(config))
    renderer = Renderer(tmp_path / "m", 512)
    assert renderer.render(sample(0)).grids  # images do without
    with pytest.raises(ModelError, match="video processor's temporal_patch_size is 4, the model's is 2"):
        renderer.render(with_videos(clip()))
