"""Samples with videos, and what the real processor makes of them, for everyone's tests."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from megatron_vlrl.models.qwen3_vl.render import chat_messages
from megatron_vlrl.types import Sample, Video
from tests.tiny import png, sample

if TYPE_CHECKING:
    from transformers import Qwen3VLProcessor


def clip(times: Sequence[float] = (0.0, 0.5, 1.0, 1.5), size: tuple[int, int] = (64, 96), seed: int = 0) -> Video:
    """A frame of (width, height) pixels for each time, all of them different."""
    frames = tuple(png(size, 100 * seed + number) for number in range(len(times)))
    return Video(frames=frames, timestamps=tuple(times))


def with_videos(*videos: Video, position: int = 0, images: Any = 0, text: str = "How many digits?") -> Sample:
    """A sample with these videos, and with images as `tests.tiny.sample` draws them."""
    return dataclasses.replace(sample(position, images, text=text), videos=videos)


def processed(processor: Qwen3VLProcessor, wanted: Sample) -> Any:
    """The tensors of Qwen3VLProcessor for a sample, its frames taken as they are."""
    chat = [
        m | {"content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m
        for m in chat_messages(wanted.messages, len(wanted.images), len(wanted.videos))
    ]
    videos = [np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in video.frames]) for video in wanted.videos]
    # A frame's time is its index over fps: with 1 frame a second, indices are times.
    metadata = [
        {"fps": 1.0, "frames_indices": list(video.timestamps), "total_num_frames": len(video.frames)}
        for video in wanted.videos
    ]
    return processor(
        text=[processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)],
        images=[Image.open(io.BytesIO(data)) for data in wanted.images] or None,
        videos=videos or None,
        video_metadata=metadata or None,
        do_sample_frames=False,
        return_tensors="pt",
    )
