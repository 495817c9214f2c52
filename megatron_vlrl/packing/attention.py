"""Index tables with which a dense attention kernel computes a packed row exactly; made once, used by every layer.

Two batches: prompts, causal on themselves; responses, each on [its prompt; itself], bottom-right causal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vlrl.packing.rows import Segment


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """B prompts (the padded tail counts as one), M responses; Pm and Rm are their greatest lengths.

    prompt_index: int64[B, Pm], packed places, a prompt's end repeated. response_index: int64[M, Rm] likewise.
    owner: int64[M], each response's prompt. response_mask: bool[M, 1, Rm, Pm + Rm], True where it may look.
    unpack: int64[T], where each packed token lies in the concatenated, flattened outputs of the two batches.
    """

    prompt_index: Tensor
    response_index: Tensor
    owner: Tensor
    response_mask: Tensor
    unpack: Tensor


def plan_attention(segments: Sequence[Segment]) -> AttentionPlan:
    """Make the tables for a row."""
    prompts = torch.tensor([segment.prompt for segment in segments])
    spans = [(owner, *span) for owner, segment in enumerate(segments) for span in segment.responses]
    table = torch.tensor(spans, dtype=torch.int64).view(-1, 3)
    owner, begin, end = table.unbind(1)
    prompt_lengths, lengths = prompts[:, 1] - prompts[:, 0], end - begin
    widest, longest = int(prompt_lengths.max()), int(lengths.max()) if spans else 0
    prompt_steps, steps = torch.arange(widest), torch.arange(longest)
    in_prompt = prompt_steps < prompt_lengths[:, None]
    in_response = steps < lengths[:, None]
    prompt_index = torch.minimum(prompts[:, :1] + prompt_steps, prompts[:, 1:] - 1)
    response_index = torch.minimum(begin[:, None] + steps, end[:, None] - 1)
    causal = torch.ones(longest, longest, dtype=torch.bool).tril().expand(len(spans), -1, -1)
    mask = torch.cat([in_prompt[owner][:, None, :].expand(-1, longest, -1), causal], dim=-1)
    unpack = torch.empty(int(max(prompts[:, 1].max(), end.max() if spans else 0)), dtype=torch.int64)
    unpack[prompt_index[in_prompt]] = torch.arange(in_prompt.numel()).view_as(in_prompt)[in_prompt]
    offset = in_prompt.numel()
    unpack[response_index[in_response]] = offset + torch.arange(in_response.numel()).view_as(in_response)[in_response]
    return AttentionPlan(
        prompt_index=prompt_index,
        response_index=response_index,
        owner=owner,
        response_mask=mask[:, None],
        unpack=unpack,
    )
