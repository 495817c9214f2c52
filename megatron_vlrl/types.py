"""The nouns: what one stage of a step hands to the next.

Everything here is torch-free, frozen and validated on construction. Shape letters, used everywhere:
P prompt tokens, R response tokens, G rollouts of a group, N rollouts of a step over all ranks,
K reward components, I images, F frames of a video, Q vision patches, T packed tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length"]
FailureKind = Literal["error", "timeout", "invalid_gold"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a prompt. `<image>` in `content` marks where the next image stands.

    `<video>` does so for videos in a sample that has some; elsewhere it is text.
    """

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """Frames already taken out of a video. timestamps: F numbers, seconds from its start, never falling.

    frames: F encoded images (PNG, JPEG, WebP) of one size, decoded when the prompt is rendered.

    Example: Video(frames=(png, png), timestamps=(0.0, 0.5))
    """

    frames: tuple[bytes, ...]
    timestamps: tuple[float, ...]

    def __post_init__(self) -> None:
        times = self.timestamps
        _require(len(self.frames) >= 1, "a video has at least one frame")
        _require(len(times) == len(self.frames), f"a video has {len(self.frames)} frames but {len(times)} timestamps")
        _require(
            all(math.isfinite(time) and time >= 0 for time in times) and list(times) == sorted(times),
            f"a video's timestamps must be seconds from 0 on, in order, not {list(times)}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One question of the dataset, as stored.

    key: unique in the dataset. task: a name in `tasks.TASKS`, or a user's `package.module:function`.
    images: encoded bytes (PNG, JPEG, WebP), decoded when the prompt is rendered. videos: their frames likewise.
    answer: gold answer, JSON. position: place in the global order, the same for every number of ranks.

    Example: Sample(key="count-7", task="count", messages=(Message(role="user", content="How many?"),),
                    images=(png,), answer="3", position=120)
    """

    key: str
    task: str
    messages: tuple[Message, ...]
    images: tuple[bytes, ...]
    answer: Any
    position: int
    meta: Mapping[str, Any] = field(default_factory=dict)
    videos: tuple[Video, ...] = ()

    def __post_init__(self) -> None:
        _require(bool(self.messages), f"sample {self.key!r} has no messages")
        marks = sum(m.content.count("<image>") for m in self.messages)
        _require(
            marks in (0, len(self.images)),
            f"sample {self.key!r} has {len(self.images)} images but {marks} <image> marks; use none or one for each",
        )
        marks = sum(m.content.count("<video>") for m in self.messages)
        _require(
            not self.videos or marks in (0, len(self.videos)),
            f"sample {self.key!r} has {len(self.videos)} videos but {marks} <video> marks; use none or one for each",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A sample as the model sees it; made once, then used by the engine and by the trainer alike.

    token_ids: int[P], image tokens expanded. positions: int64[3, P], MRoPE (time, height, width).
    grids: (t, h, w) in patches for each image. patches: float32[Q_i, patch size] for each image,
    in the merge-block order of the Hugging Face processor. A video stands there as its steps in time (pairs of frames,
    for Qwen3-VL), each an image with t = 1. video_grids: which of the grids are such steps, ascending.
    """

    sample: Sample
    token_ids: tuple[int, ...]
    positions: NDArray[np.int64]
    grids: tuple[tuple[int, int, int], ...]
    patches: tuple[NDArray[np.float32], ...]
    video_grids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require(self.positions.shape == (3, len(self.token_ids)), "positions must be int64[3, P]")
        _require(len(self.grids) == len(self.patches), "one grid for each image")
        for grid, patch in zip(self.grids, self.patches, strict=True):
            _require(
                grid[0] * grid[1] * grid[2] == len(patch),
                f"grid {grid} does not hold {len(patch)} patches",
            )
        _require(
            all(0 <= index < len(self.grids) for index in self.video_grids),
            f"video_grids {self.video_grids} name grids that are not there; there are {len(self.grids)}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How responses are drawn; the trainer computes log-probs of this same distribution.

    temperature 0 is greedy. banned_token_ids never appear and are left out of the softmax (vision tokens).
    stop_token_ids end a response and are part of it.
    seed: with a prompt's position and the rollout's number it fixes the random draw, whatever rank or batch.
    """

    n: int
    temperature: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    banned_token_ids: tuple[int, ...] = ()
    seed: int = 0

    @property
    def log_prob_temperature(self) -> float:
        """What the logits are divided by in log-probs: the temperature, or 1 for greedy answers."""
        return self.temperature or 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One response.

    token_ids: int[R], R >= 1, the stop token included. log_probs: float32[R], of the sampling
    distribution, natural log. temperature: the one of these log-probs, over 0. text: decoded, without the
    stop token. weight_version: the optimizer step whose weights wrote it.
    """

    token_ids: tuple[int, ...]
    log_probs: NDArray[np.float32]
    temperature: float
    text: str
    finish_reason: FinishReason
    weight_version: int

    def __post_init__(self) -> None:
        _require(len(self.token_ids) >= 1, "a rollout has at least one token")
        _require(self.log_probs.shape == (len(self.token_ids),), "one log-prob for each token")
        _require(
            math.isfinite(self.temperature) and self.temperature > 0,
            f"a rollout's temperature is over 0, not {self.temperature}; log-probs of greedy answers have 1",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """One prompt and its G rollouts, drawn at one temperature. Groups travel whole through every stage."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    def __post_init__(self) -> None:
        _require(len(self.rollouts) >= 1, f"group {self.prompt.sample.key!r} has no rollouts")
        temperatures = sorted({rollout.temperature for rollout in self.rollouts})
        _require(
            len(temperatures) == 1,
            f"group {self.prompt.sample.key!r} has rollouts of the temperatures {temperatures}; one draw has one",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardFailure:
    """Why a reward could not be computed. Never a silent 0: the rollout is left out of the ranking."""

    kind: FailureKind
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardBreakdown:
    """The reward of one rollout. components: raw values by name; weights: of the sum; total: float64.

    With a failure, total is NaN and components holds what was known before it.
    """

    components: Mapping[str, float]
    weights: Mapping[str, float]
    total: float
    failure: RewardFailure | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredGroup:
    """A group with the reward of each of its rollouts, in their order."""

    group: RolloutGroup
    rewards: tuple[RewardBreakdown, ...]

    def __post_init__(self) -> None:
        _require(len(self.rewards) == len(self.group.rollouts), "one reward for each rollout")

    @property
    def position(self) -> int:
        """The prompt's place in the global order."""
        return self.group.prompt.sample.position


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardTable:
    """The rewards of a step over all data-parallel ranks, ordered by (position, rollout).

    position: int64[N], the prompt's place in the global order, which also names its group.
    rollout: int64[N], 0..G-1. task: int64[N], index into `task_names`. total: float64[N], NaN where failed.
    components: float64[N, K], NaN where a rollout has no such component. weights: float64[N, K], of the components in
    the total, 0 where there is none. length: int64[N], response tokens. peers: N names; rows are ranked with those of
    the same name. It is the task, or a metadata field of the sample.
    """

    position: NDArray[np.int64]
    rollout: NDArray[np.int64]
    task: NDArray[np.int64]
    total: NDArray[np.float64]
    components: NDArray[np.float64]
    weights: NDArray[np.float64]
    length: NDArray[np.int64]
    peers: NDArray[np.str_]
    task_names: tuple[str, ...]
    component_names: tuple[str, ...]

    def __post_init__(self) -> None:
        n = len(self.position)
        for name in ("rollout", "task", "total", "length", "peers"):
            _require(len(getattr(self, name)) == n, f"column {name} has not {n} rows")
        for name in ("components", "weights"):
            _require(getattr(self, name).shape == (n, len(self.component_names)), f"one column of {name} for each name")

    def component(self, name: str) -> NDArray[np.float64]:
        """The column of one component, float64[N]; NaN throughout where no rollout has it."""
        if name not in self.component_names:
            return np.full(len(self.position), math.nan)
        return self.components[:, self.component_names.index(name)]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdvantageResult:
    """One float64 for each rollout, in the order of the rewards given.

    uniform: its group's rewards are all equal (A = 0, unless the kind says otherwise). tied: shares its rank.
    dropped: left out of the ranking (failed reward). All bool[N].
    state: what the kind wants back as its option `state` at the next step, JSON-like; empty for most.
    """

    values: NDArray[np.float64]
    uniform: NDArray[np.bool_]
    tied: NDArray[np.bool_]
    dropped: NDArray[np.bool_]
    state: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """A mean with its denominator, so that means of shards can be joined exactly."""

    total: float
    count: float

    @property
    def value(self) -> float:
        """total / count, NaN when nothing was counted."""
        return self.total / self.count if self.count else float("nan")

    def __add__(self, other: Mean) -> Mean:
        return Mean(total=self.total + other.total, count=self.count + other.count)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """What one step reports, the same on every rank.

    means: by metric name, over the whole global batch. scalars: norms, rates, maxima. seconds: by stage.
    skipped: why no optimizer step was taken, or None.
    """

    step: int
    means: Mapping[str, Mean]
    scalars: Mapping[str, float]
    seconds: Mapping[str, float]
    skipped: str | None = None

    def flat(self) -> dict[str, float]:
        """One level of names for metrics.jsonl and TensorBoard; seconds as `seconds/<stage>`."""
        out = {name: mean.value for name, mean in self.means.items()}
        out.update(self.scalars)
        out.update({f"seconds/{name}": value for name, value in self.seconds.items()})
        return out
