"""A sample becomes a prompt: chat template, image tokens, positions and patches.

In: `Sample`s and a Hugging Face folder (chat template, tokenizer, image and video processor, config). Out: `Prompt`s,
made once and used by the engine and the trainer alike; and the way back, token ids to text. Token ids are those that
Qwen3VLProcessor gives; a dataset's text can never become a special token.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_vlrl.data.decode import decode_image
from megatron_vlrl.errors import ModelError, SampleError
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.models.qwen3_vl.geometry import Grid, image_token_count, mrope_positions
from megatron_vlrl.models.qwen3_vl.video import VideoFrames, check_sizes, step_times, timestamp_text
from megatron_vlrl.types import Message, Prompt, Sample

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"
IMAGE_PART, VIDEO_PART = {"type": "image"}, {"type": "video"}
Times = tuple[tuple[float, ...], ...]  # of each video, of each of its steps in time


class Renderer:
    """Renders the samples of a run with the files of one model folder.

    `<image>` in a message marks where its image stands, `<video>` its video; without marks the images, then the videos
    come first in the first user message. ModelError when the folder's files are missing or do not fit together.
    """

    def __init__(self, folder: Path, max_prompt_tokens: int) -> None:
        self.spec = Qwen3VLSpec.load(folder)
        self._limit = max_prompt_tokens
        self._tokenizer = _load_tokenizer(folder)
        self._processor = _load_image_processor(folder, self.spec)
        self._video = VideoFrames(folder, self.spec)
        self.stop_token_ids = _stop_token_ids(folder, self._tokenizer)
        self.banned_token_ids = _banned_token_ids(self._tokenizer, self.spec)
        self._special = re.compile("|".join(map(re.escape, _special_tokens(self._tokenizer))))
        self._template_ids = functools.lru_cache(maxsize=1024)(self._apply_template)

    def render(self, sample: Sample) -> Prompt:
        """The sample as the model sees it. SampleError when it is unusable: image, text or length."""
        unexpanded = self._unexpanded_ids(sample)
        places = [token for token in unexpanded if token in (self.spec.image_token_id, self.spec.video_token_id)]
        is_video = [token == self.spec.video_token_id for token in places]
        images = (self._process(decode_image(data, sample.key), sample.key) for data in sample.images)
        steps = (step for video in sample.videos for step in self._video.process(video, sample.key))
        visions = [next(steps if moving else images) for moving in is_video]
        grids = tuple(grid for grid, _ in visions)
        counts = [image_token_count(grid, self.spec.vision.merge_size) for grid in grids]
        total = len(unexpanded) - len(counts) + sum(counts)
        if total > self._limit:
            raise SampleError(
                sample.key,
                f"its prompt has {total} tokens, {sum(counts)} of them vision tokens, over data.max_prompt_tokens = "
                f"{self._limit}; raise the limit, or shorten the text, or shrink the images or videos",
            )
        token_ids = unexpanded
        for kind in (self.spec.image_token_id, self.spec.video_token_id):
            own = [count for token, count in zip(places, counts, strict=True) if token == kind]
            token_ids = expand_images(token_ids, kind, own)
        return Prompt(
            sample=sample,
            token_ids=token_ids,
            positions=mrope_positions(token_ids, grids, self.spec),
            grids=grids,
            patches=tuple(patches for _, patches in visions),
            video_grids=tuple(index for index, moving in enumerate(is_video) if moving),
        )

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a response's text. Tags are single tokens; the names of special tokens are plain text."""
        return tuple(self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a response without its stop token. Every other token is kept, as the model wrote it."""
        body = token_ids[:-1] if token_ids and token_ids[-1] in self.stop_token_ids else token_ids
        return self._tokenizer.decode(list(body), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _unexpanded_ids(self, sample: Sample) -> tuple[int, ...]:
        """Token ids with one image token for each image and one video token for each step in time of a video."""
        import jinja2

        for message in sample.messages:
            if found := self._special.search(message.content):
                raise SampleError(
                    sample.key,
                    f"its text holds the special token {found.group()!r}, which only the chat template may write; "
                    f"mark images with {IMAGE_MARK}, videos with {VIDEO_MARK}",
                )
        times = tuple(step_times(video, self.spec.vision.temporal_patch_size) for video in sample.videos)
        try:
            token_ids = self._template_ids(sample.messages, len(sample.images), times)
        except jinja2.TemplateError as error:
            raise SampleError(sample.key, f"the model's chat template refuses its messages: {error}") from error
        if (placed := token_ids.count(self.spec.image_token_id)) != len(sample.images):
            raise SampleError(
                sample.key,
                f"{placed} of its {len(sample.images)} images have a place in the prompt; add a user message",
            )
        if token_ids.count(self.spec.video_token_id) != sum(map(len, times)):
            raise SampleError(
                sample.key,
                f"its {len(sample.videos)} videos have not one place each in the prompt; add a user message, and use a "
                "chat template that knows videos",
            )
        return token_ids

    def _apply_template(self, messages: tuple[Message, ...], images: int, times: Times) -> tuple[int, ...]:
        chat = chat_messages(messages, images, len(times))
        text = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        if times:
            text = self._place_videos(text, times)
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _place_videos(self, text: str, times: Times) -> str:
        """The text with each video's token replaced by its steps: timestamp and a video token between vision tokens.

        The template's own pair of vision tokens stays around the whole, as Qwen3VLProcessor of transformers 5.19 leaves
        it. A template that writes more or fewer places than there are videos gives another number of video tokens,
        which `_unexpanded_ids` sees.
        """
        start, video, end = self._tokenizer.convert_ids_to_tokens(
            [self.spec.vision_start_token_id, self.spec.video_token_id, self.spec.vision_end_token_id]
        )
        texts = iter(["".join(timestamp_text(time) + start + video + end for time in steps) for steps in times])
        return re.sub(re.escape(video), lambda place: next(texts, place.group()), text)

    def _process(self, image: Image, key: str) -> tuple[Grid, NDArray[np.float32]]:
        try:
            out = self._processor(images=[image], return_tensors="np")
        except ValueError as error:  # an aspect ratio beyond 200
            raise SampleError(key, f"its image of {image.width}x{image.height} pixels is refused: {error}") from error
        t, h, w = out["image_grid_thw"][0].tolist()
        return (t, h, w), np.asarray(out["pixel_values"], dtype=np.float32)


def chat_messages(messages: Sequence[Message], images: int, videos: int = 0) -> list[dict[str, Any]]:
    """Messages as chat templates take them: a string, or a list of text, image and video parts where those stand.

    `<video>` is a mark only where there are videos: text about web pages may hold it.
    """
    marks = {IMAGE_MARK: IMAGE_PART} | ({VIDEO_MARK: VIDEO_PART} if videos else {})
    first_user = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    unmarked = []
    for mark, count in ((IMAGE_MARK, images), (VIDEO_MARK, videos)):
        if not any(mark in message.content for message in messages):
            unmarked += [mark] * count
    out: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        leading = [marks[mark] for mark in unmarked] if index == first_user else []
        parts = leading + _parts(message.content, marks)
        plain = all(part["type"] == "text" for part in parts)
        out.append({"role": message.role, "content": message.content if plain else parts})
    return out


def _parts(content: str, marks: Mapping[str, dict[str, str]]) -> list[dict[str, str]]:
    """Text parts with an image or video part at every mark; empty texts are left out."""
    pieces = re.split(f"({'|'.join(marks)})", content)
    return [marks.get(piece, {"type": "text", "text": piece}) for piece in pieces if piece]


def expand_images(token_ids: Iterable[int], image_token_id: int, counts: Sequence[int]) -> tuple[int, ...]:
    """The i-th image token repeated counts[i] times; `counts` has one entry for each."""
    count = iter(counts)
    pieces = ([token] * next(count) if token == image_token_id else [token] for token in token_ids)
    return tuple(itertools.chain.from_iterable(pieces))


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer could be loaded from {folder}: {error}") from error
    if not tokenizer.is_fast or not tokenizer.chat_template:
        raise ModelError(f"{folder} must hold a fast tokenizer (tokenizer.json) and a chat template")
    return tokenizer


def _load_image_processor(folder: Path, spec: Qwen3VLSpec) -> Qwen2VLImageProcessorPil:
    from transformers import Qwen2VLImageProcessorPil

    try:
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"no image processor could be loaded from {folder}: {error}") from error
    check_sizes(processor, "image processor", folder, spec)
    return processor


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Longest first, so that an error names the whole token."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)


def _stop_token_ids(folder: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The ends of a response: generation_config.json's, and the tokenizer's own."""
    path = Path(folder) / "generation_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    stops = [named] if isinstance(named, int) else list(named or [])
    if tokenizer.eos_token_id is not None:
        stops.append(tokenizer.eos_token_id)
    if not stops:
        raise ModelError(f"{folder}: neither generation_config.json nor the tokenizer names an end-of-text token")
    return tuple(dict.fromkeys(stops))


def _banned_token_ids(tokenizer: PreTrainedTokenizerFast, spec: Qwen3VLSpec) -> tuple[int, ...]:
    """Vision tokens, and the embedding's padding rows, which have no token."""
    known = set(tokenizer.get_vocab().values())
    if max(known) >= spec.text.vocab_size:
        raise ModelError(
            f"the tokenizer's largest id is {max(known)}, but the model's vocab_size is {spec.text.vocab_size}; "
            "they are not of one model"
        )
    return tuple(sorted({*spec.vision_token_ids, *(set(range(spec.text.vocab_size)) - known)}))
