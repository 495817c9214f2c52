"""Groups -> one packed row: [prompt | response 1 | ... | response G] for each group, one after the other.

In: RolloutGroups (lists). Out: a `Microbatch` of tensors, which every backend reads. A prompt and its images are
computed once for its G responses: each response attends to the prompt and to itself.

T packed tokens, R response tokens, U rows that need logits, Q vision patches, I images, M responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_vlrl.types import RolloutGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Places of one group in the row, as half-open ranges; `responses` is empty for the padded tail."""

    prompt: tuple[int, int]
    responses: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What the token loss needs for each response token: float32[R] but `task`, int64[R]."""

    rollout_log_probs: Tensor  # the sampler's
    advantages: Tensor
    weights: Tensor  # the token's share of the objective, global denominators included
    entropy_weights: Tensor  # the same for the entropy term; 0 where its task is inside the band
    kl_weights: Tensor  # the same for the divergence from the reference
    task: Tensor
    counted: Tensor  # 1, or 0 for tokens that only fill a row and enter no mean
    fresh: Tensor  # 1 where the weights as the step found them wrote the token, else 0
    old_log_probs: Tensor | None = None  # at the step's start; None: these weights are those
    reference_log_probs: Tensor | None = None  # None: no reference


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """One packed row. Indices are int64.

    input_ids: [T]. positions: [3, T], MRoPE. segments: host table. logit_rows: [U], tokens whose logits are needed; the
    prompt's last token stands once for the first tokens of its G responses. temperatures: float32[U], what these logits
    are divided by. source: [R], place in logit_rows. target_ids: [R]. patches: float32[Q, patch size]. grids: (t, h, w)
    of each image, and of each step in time of a video, in row order. lengths: response lengths, M numbers that add up
    to R. targets: None when only scoring.
    """

    input_ids: Tensor
    positions: Tensor
    segments: tuple[Segment, ...]
    logit_rows: Tensor
    temperatures: Tensor
    source: Tensor
    target_ids: Tensor
    patches: Tensor
    grids: tuple[tuple[int, int, int], ...]
    lengths: tuple[int, ...]
    targets: Targets | None = None

    def with_targets(self, targets: Targets) -> Microbatch:
        """The same row with what the loss needs."""
        if len(targets.weights) != len(self.target_ids):
            raise ValueError(f"targets for {len(targets.weights)} tokens, the row has {len(self.target_ids)}")
        return replace(self, targets=targets)


def pack(groups: Sequence[RolloutGroup], *, multiple: int = 1, pad_id: int = 0) -> Microbatch:
    """Lay `groups` out in one row. Its length is a multiple of `multiple`: the tensor degree, for sequence parallel."""
    ids: list[int] = []
    positions: list[np.ndarray] = []
    segments: list[Segment] = []
    rows: list[int] = []
    temperatures: list[float] = []
    source: list[int] = []
    targets: list[int] = []
    for group in groups:
        prompt = group.prompt
        start = len(ids)
        ids.extend(prompt.token_ids)
        positions.append(prompt.positions)
        # Responses all continue where the prompt ends: their positions restart there, not after each other.
        following = int(prompt.positions.max()) + 1
        last_prompt_row = len(rows)
        rows.append(len(ids) - 1)
        spans = []
        for rollout in group.rollouts:
            begin, length = len(ids), len(rollout.token_ids)
            ids.extend(rollout.token_ids)
            positions.append(np.broadcast_to(following + np.arange(length), (3, length)))
            spans.append((begin, begin + length))
            source.append(last_prompt_row)
            source.extend(range(len(rows), len(rows) + length - 1))
            rows.extend(range(begin, begin + length - 1))  # the last token predicts nothing
            targets.extend(rollout.token_ids)
        segments.append(Segment(prompt=(start, start + len(prompt.token_ids)), responses=tuple(spans)))
        temperatures.extend([group.rollouts[0].temperature] * (len(rows) - last_prompt_row))
    tail = -len(ids) % multiple
    if tail:
        segments.append(Segment(prompt=(len(ids), len(ids) + tail), responses=()))
        ids.extend([pad_id] * tail)
        positions.append(np.zeros((3, tail), dtype=np.int64))
    patches = [patch for group in groups for patch in group.prompt.patches]
    return Microbatch(
        input_ids=torch.tensor(ids),
        positions=torch.from_numpy(np.concatenate(positions, axis=1).astype(np.int64)),
        segments=tuple(segments),
        logit_rows=torch.tensor(rows),
        temperatures=torch.tensor(temperatures, dtype=torch.float32),
        source=torch.tensor(source),
        target_ids=torch.tensor(targets),
        patches=torch.from_numpy(np.concatenate(patches)) if patches else torch.empty(0, 0),
        grids=tuple(grid for group in groups for grid in group.prompt.grids),
        lengths=tuple(len(rollout.token_ids) for group in groups for rollout in group.rollouts),
    )
