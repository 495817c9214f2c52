"""Frames of a video -> patches and timestamps, as transformers 5.19's Qwen3VLProcessor makes them.

In: a `Video`, frames already taken out of its container (which is another program's work). Out: for each step in time,
which is `temporal_patch_size` frames, an image's grid and patches, and the time that stands before it as text.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_vlrl.data.decode import decode_image
from megatron_vlrl.errors import ModelError, SampleError
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.models.qwen3_vl.geometry import Grid
from megatron_vlrl.types import Video

if TYPE_CHECKING:
    from transformers import Qwen3VLVideoProcessor


def step_times(video: Video, frames_per_step: int) -> tuple[float, ...]:
    """Seconds of each step: the mean of its first and last frame; the last frame fills up the last step."""
    times = list(video.timestamps)
    times += times[-1:] * (-len(times) % frames_per_step)
    firsts, lasts = times[::frames_per_step], times[frames_per_step - 1 :: frames_per_step]
    return tuple((first + last) / 2 for first, last in zip(firsts, lasts, strict=True))


def timestamp_text(seconds: float) -> str:
    """What stands before a step's tokens."""
    return f"<{seconds:.1f} seconds>"


def check_sizes(processor: Any, what: str, folder: Path, spec: Qwen3VLSpec) -> None:
    """ModelError where a processor cuts other patches than the model takes."""
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        mine, model = getattr(processor, name), getattr(spec.vision, name)
        if mine != model:
            raise ModelError(f"{folder}: the {what}'s {name} is {mine}, the model's is {model}; make them equal")


class VideoFrames:
    """The folder's video processor, loaded with the first video: it needs torchvision, which images do without."""

    def __init__(self, folder: Path, spec: Qwen3VLSpec) -> None:
        self._folder, self._spec = folder, spec

    def process(self, video: Video, key: str) -> list[tuple[Grid, NDArray[np.float32]]]:
        """Grid (1, h, w) and patches [h * w, patch size] of each step in time. SampleError when it is unusable."""
        frames = [np.asarray(decode_image(data, key)) for data in video.frames]
        sizes = sorted({f"{frame.shape[1]}x{frame.shape[0]}" for frame in frames})
        if len(sizes) > 1:
            raise SampleError(key, f"its video has frames of {' and '.join(sizes)} pixels; make them of one size")
        try:
            out = self._processor(
                videos=[np.stack(frames)],
                do_sample_frames=False,  # the dataset says which frames there are
                # Unset means off in transformers 5.19 and on in 5.22: said here, a run's tokens do not change with it.
                cap_pixels_per_frame=bool(self._processor.cap_pixels_per_frame),
                input_data_format="channels_last",
                return_tensors="np",
            )
        except ValueError as error:  # fewer frames than a step has, or an aspect ratio beyond 200
            raise SampleError(key, f"its video of {len(frames)} frames of {sizes[0]} is refused: {error}") from error
        steps, height, width = out["video_grid_thw"][0].tolist()
        patches = np.asarray(out["pixel_values_videos"], dtype=np.float32)
        return [((1, height, width), part) for part in np.split(patches, steps)]

    @functools.cached_property
    def _processor(self) -> Qwen3VLVideoProcessor:
        try:
            from transformers import Qwen3VLVideoProcessor

            processor = Qwen3VLVideoProcessor.from_pretrained(self._folder, local_files_only=True)
        except ImportError as error:
            raise ModelError(f"samples with videos need torchvision, built for the installed torch: {error}") from error
        except (OSError, ValueError) as error:
            raise ModelError(f"no video processor could be loaded from {self._folder}: {error}") from error
        check_sizes(processor, "video processor", self._folder, self._spec)
        return processor
