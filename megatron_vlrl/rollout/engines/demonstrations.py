"""The engine that writes nothing itself: it answers with the sample's demonstration.

So a supervised warm start is the same loop as training by rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_vlrl.errors import RolloutError, SampleError
from megatron_vlrl.types import Prompt, Rollout, RolloutGroup, Sampling

if TYPE_CHECKING:
    from torch import Tensor


class DemonstrationEngine:
    """Reads `meta["demonstration"]`, a string. encode: text -> token ids; decode: token ids -> text.

    Log-probs are zeros: nothing was drawn, so a loss that needs them (a ratio) has no meaning here.
    """

    needs_weights = False

    def __init__(self, encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str]) -> None:
        self._encode = encode
        self._decode = decode
        self._version = 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """One group of one rollout for each prompt; SampleError names a sample without a usable demonstration."""
        if sampling.n != 1:
            raise RolloutError(f"a sample has one demonstration; set rollout.samples_per_prompt to 1, not {sampling.n}")
        if not sampling.stop_token_ids:
            raise RolloutError("a demonstration ends with a stop token, but sampling has none")
        return [RolloutGroup(prompt=p, rollouts=(self._rollout(p, sampling),)) for p in prompts]

    def update_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Note the version alone; the weights are left unread."""
        self._version = version

    def close(self) -> None:
        """Nothing is held."""

    def _rollout(self, prompt: Prompt, sampling: Sampling) -> Rollout:
        key, text = prompt.sample.key, prompt.sample.meta.get("demonstration")
        if not isinstance(text, str):
            raise SampleError(key, 'has no text under meta["demonstration"], which a warm start imitates')
        written = tuple(self._encode(text))
        never = sorted(set(written) & {*sampling.banned_token_ids, *sampling.stop_token_ids})
        if never:
            raise SampleError(key, f"its demonstration contains the banned or stop token ids {never}")
        if len(written) + 1 > sampling.max_new_tokens:
            raise SampleError(
                key,
                f"its demonstration has {len(written)} tokens and a stop token; "
                f"rollout.max_new_tokens is {sampling.max_new_tokens}",
            )
        ids = (*written, sampling.stop_token_ids[0])
        return Rollout(
            token_ids=ids,
            log_probs=np.zeros(len(ids), dtype=np.float32),
            temperature=sampling.log_prob_temperature,
            text=self._decode(written),
            finish_reason="stop",
            weight_version=self._version,
        )
