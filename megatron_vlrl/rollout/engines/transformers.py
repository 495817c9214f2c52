"""The in-process engine: the policy as a Hugging Face model on the host, its weights handed over by name.

The reference for every other engine, and what runs where nothing but torch and transformers is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForImageTextToText, Qwen3VLForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from megatron_vlrl.errors import ModelError, RolloutError
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.models.qwen3_vl.names import EXPERTS
from megatron_vlrl.rollout.engines.decoding import Responses, grouped_query_attention, respond
from megatron_vlrl.rollout.sampling import check_sampling
from megatron_vlrl.types import Prompt, Rollout, RolloutGroup, Sampling

ATTENTION = "vlrl_grouped_query"


class TransformersEngine:
    """Holds the weights of `folder` until others are handed over.

    decode: response token ids -> text. batch_prompts: prompts in one forward pass. dtype: "float32" or "bfloat16".
    """

    needs_weights = True

    def __init__(self, folder: Path, *, decode: Callable[[Sequence[int]], str], batch_prompts: int, dtype: str) -> None:
        self._decode = decode
        self._batch_prompts = batch_prompts
        self._vocab_size = Qwen3VLSpec.load(folder).text.vocab_size
        self._model: Qwen3VLForConditionalGeneration = _load(folder, dtype)
        self._version: int | None = 0  # None: half updated, not to be used

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """One group for each prompt, in order; RolloutError if the weights are not whole or not finite."""
        if self._version is None:
            raise RolloutError("the last weight update did not finish; hand over all weights before generating")
        check_sampling(sampling, self._vocab_size)
        # Prompts of like length together: less padding. The draw does not depend on the company a prompt keeps.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
        groups: dict[int, RolloutGroup] = {}
        for start in range(0, len(order), self._batch_prompts):
            batch = order[start : start + self._batch_prompts]
            rollouts = self._rollouts(respond(self._model, [prompts[i] for i in batch], sampling), sampling)
            for row, i in enumerate(batch):
                own = rollouts[row * sampling.n : (row + 1) * sampling.n]
                groups[i] = RolloutGroup(prompt=prompts[i], rollouts=tuple(own))
        return [groups[i] for i in range(len(prompts))]

    def update_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Copy every weight by name. Until one update has gone through whole, `generate` refuses."""
        self._version = None
        # Tied weights are one parameter under the embedding's name, as in the safetensors of a Hugging Face folder.
        waiting = dict(self._model.named_parameters())
        faults = []
        with torch.no_grad():
            for name, weight in weights:  # to the end in any case: the sender may be one of several ranks in step
                mine = waiting.pop(name, None)
                if mine is None:
                    faults.append(f"{name} is extra or came twice")
                elif name.endswith(EXPERTS) and mine.shape == weight.mT.shape:
                    mine.copy_(weight.mT)  # as the published folders hold experts
                elif mine.shape != weight.shape:
                    faults.append(f"{name} is {list(weight.shape)}, not {list(mine.shape)}")
                else:
                    mine.copy_(weight)
        faults += [f"{name} is missing" for name in waiting]
        if faults:
            more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
            raise RolloutError(
                f"the weights of version {version} do not fit the engine's model: {'; '.join(faults[:10])}{more}"
            )
        self._version = version

    def close(self) -> None:
        """Drop the model's weights."""
        self._version = None
        self._model.to("meta")

    def _rollouts(self, responses: Responses, sampling: Sampling) -> list[Rollout]:
        assert self._version is not None
        out = []
        for tokens, log_probs, length in zip(
            responses.tokens.tolist(), responses.log_probs.numpy(), responses.lengths.tolist(), strict=True
        ):
            ids = tuple(tokens[:length])
            stopped = ids[-1] in sampling.stop_token_ids
            out.append(
                Rollout(
                    token_ids=ids,
                    log_probs=log_probs[:length].copy(),
                    temperature=sampling.log_prob_temperature,
                    text=self._decode(ids[:-1] if stopped else ids),
                    finish_reason="stop" if stopped else "length",
                    weight_version=self._version,
                )
            )
        return out


def _load(folder: Path, dtype: str) -> Qwen3VLForConditionalGeneration:
    """The folder's model in evaluation mode, without gradients."""
    AttentionInterface.register(ATTENTION, grouped_query_attention)
    disable_progress_bar()  # one a rank, over the run's own
    model, found = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        attn_implementation={"text_config": ATTENTION, "vision_config": "sdpa"},
        output_loading_info=True,
        local_files_only=True,
    )
    lacking = sorted(found["missing_keys"])
    if lacking:  # transformers would fill them with random numbers
        raise ModelError(f"{folder} lacks {len(lacking)} weights of its model, the first {lacking[:5]}")
    return model.eval().requires_grad_(False)
