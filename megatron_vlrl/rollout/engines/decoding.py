"""Prompts -> responses through a Hugging Face Qwen3-VL: one prefill of each prompt, then a token a step for all rows.

Rows are (prompt, rollout) pairs, prompt by prompt. Letters: B prompts of the batch, N rows, L longest prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from megatron_vlrl.rollout.sampling import draw, uniforms
from megatron_vlrl.types import Prompt, Sampling

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration

# Share of rows still writing at or below which the finished ones are dropped. Dropping copies the rest of the cache
# once, about what one step costs; a row kept costs its part of every later step.
COMPACT_AT = 0.9


def grouped_query_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA in which the kernel shares key-value heads.

    Under a mask, transformers' own first copies the cache to every query head
    (integrations/sdpa_attention.py, use_gqa_in_sdpa), which costs more than the attention itself.
    """
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=kwargs["scaling"], enable_gqa=True
    )
    return out.transpose(1, 2), None


@dataclass(frozen=True, slots=True)
class Responses:
    """tokens: int64[N, max_new]; log_probs: float32[N, max_new]; lengths: int64[N], the stop token included."""

    tokens: Tensor
    log_probs: Tensor
    lengths: Tensor


@dataclass(slots=True)
class _Rows:
    """What is still writing. index: int64[N], place in the result. visible: bool[N, L + max_new], keys to attend to."""

    index: Tensor
    hidden: Tensor  # [N, D], of the last token
    visible: Tensor
    position: Tensor  # int64[N], of the first response token
    done: Tensor  # bool[N]
    cache: DynamicCache

    def drop_finished(self) -> None:
        """Keep only rows that have not stopped; a row's values do not depend on which others are there."""
        keep = (~self.done).nonzero()[:, 0]
        self.index, self.hidden, self.visible = self.index[keep], self.hidden[keep], self.visible[keep]
        self.position, self.done = self.position[keep], self.done[keep]
        self.cache.batch_select_indices(keep)


def respond(model: Qwen3VLForConditionalGeneration, prompts: Sequence[Prompt], sampling: Sampling) -> Responses:
    """Draw `sampling.n` responses to each prompt, all in one batch."""
    rows = _prefill(model, prompts, sampling)
    count = len(rows.index)
    chance = torch.from_numpy(_chances(prompts, sampling))
    penalty = torch.zeros(model.lm_head.out_features)
    penalty[list(sampling.banned_token_ids)] = -torch.inf
    stops = torch.tensor(sampling.stop_token_ids, dtype=torch.int64)
    out = Responses(
        tokens=torch.zeros(count, sampling.max_new_tokens, dtype=torch.int64),
        log_probs=torch.zeros(count, sampling.max_new_tokens),
        lengths=torch.full((count,), sampling.max_new_tokens),
    )
    for step in range(sampling.max_new_tokens):
        logits = model.lm_head(rows.hidden).float() + penalty
        token, log_prob = draw(logits, chance[rows.index, step], sampling.temperature)
        # A finished row that has not been dropped yet goes on writing past its length: never read.
        out.tokens[rows.index, step] = token
        out.log_probs[rows.index, step] = log_prob
        ends = torch.isin(token, stops) & ~rows.done
        out.lengths[rows.index[ends]] = step + 1
        rows.done |= ends
        writing = len(rows.done) - int(rows.done.sum())
        if writing == 0 or step + 1 == sampling.max_new_tokens:
            break
        rows.hidden = _advance(model, rows, token, step)
        if writing <= COMPACT_AT * len(rows.done):
            rows.drop_finished()
    return out


def _chances(prompts: Sequence[Prompt], sampling: Sampling) -> NDArray[np.float64]:
    """float64[N, max_new]: the uniform number behind every token."""
    return np.stack(
        [
            uniforms(sampling.seed, prompt.sample.position, rollout, sampling.max_new_tokens)
            for prompt in prompts
            for rollout in range(sampling.n)
        ]
    )


def _prefill(model: Qwen3VLForConditionalGeneration, prompts: Sequence[Prompt], sampling: Sampling) -> _Rows:
    """Run each prompt once and hand its cache to its n rows."""
    ids, positions, visible = _left_padded(prompts)
    cache = DynamicCache(config=model.config.text_config)
    hidden = model.model(
        input_ids=ids,
        attention_mask=_prompt_mask(visible),
        position_ids=positions,
        **_vision_inputs(prompts),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1]
    n = sampling.n
    cache.batch_repeat_interleave(n)
    return _Rows(
        index=torch.arange(len(prompts) * n),
        hidden=hidden.repeat_interleave(n, dim=0),
        visible=F.pad(visible.repeat_interleave(n, dim=0), (0, sampling.max_new_tokens), value=True),
        position=positions.amax(dim=(0, 2)).repeat_interleave(n) + 1,
        done=torch.zeros(len(prompts) * n, dtype=torch.bool),
        cache=cache,
    )


def _vision_inputs(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Patches and grids under the model's two sets of names: images apart from videos, each in the prompts' order."""
    inputs = {}
    for pixels_name, grid_name, wanted in (
        ("pixel_values", "image_grid_thw", False),
        ("pixel_values_videos", "video_grid_thw", True),
    ):
        own = [
            (grid, patch)
            for prompt in prompts
            for index, (grid, patch) in enumerate(zip(prompt.grids, prompt.patches, strict=True))
            if (index in prompt.video_grids) == wanted
        ]
        if own:
            inputs[pixels_name] = torch.from_numpy(np.concatenate([patch for _, patch in own]))
            inputs[grid_name] = torch.tensor([grid for grid, _ in own])
    return inputs


def _left_padded(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, Tensor]:
    """ids int64[B, L], MRoPE positions int64[3, B, L], where tokens are bool[B, L]; all prompts end at L - 1."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    positions = torch.zeros(3, len(prompts), longest, dtype=torch.int64)
    visible = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt.token_ids)
        ids[row, start:] = torch.tensor(prompt.token_ids)
        positions[:, row, start:] = torch.from_numpy(prompt.positions)
        visible[row, start:] = True
    return ids, positions, visible


def _prompt_mask(visible: Tensor) -> Tensor:
    """bool[B, 1, L, L]: causal over real tokens; padding sees itself, as a query without keys would be NaN."""
    size = visible.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    return ((visible[:, None, :] & causal) | torch.eye(size, dtype=torch.bool))[:, None]


def _advance(model: Qwen3VLForConditionalGeneration, rows: _Rows, token: Tensor, step: int) -> Tensor:
    """Append response token number `step` of every row to its cache; return its hidden state [N, D]."""
    seen = rows.cache.get_seq_length() + 1
    out = model.model.language_model(
        input_ids=token[:, None],
        attention_mask=rows.visible[:, None, None, :seen],
        position_ids=(rows.position + step).expand(3, -1)[..., None],
        past_key_values=rows.cache,
        use_cache=True,
    )
    return out.last_hidden_state[:, 0]
