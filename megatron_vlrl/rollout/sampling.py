"""The draw of one token: logits and a uniform number go in, a token and its log-prob come out.

The uniforms come from a counter-based generator keyed by (seed, prompt, rollout), so a response depends on neither
the batch, nor the rank, nor any global random state.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vlrl.config.schema import RolloutConfig
from megatron_vlrl.errors import RolloutError
from megatron_vlrl.types import Sampling

_UINT64 = (1 << 64) - 1


class Vocabulary(Protocol):
    """What sampling needs of the model's renderer."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a response."""
        ...

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        """Ids that never appear in one."""
        ...


def sampling_for(config: RolloutConfig, vocabulary: Vocabulary, *, seed: int) -> Sampling:
    """The distribution that a run draws from, and whose log-probs it trains on."""
    return Sampling(
        n=config.samples_per_prompt,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        stop_token_ids=vocabulary.stop_token_ids,
        banned_token_ids=vocabulary.banned_token_ids,
        seed=seed,
    )


def uniforms(seed: int, position: int, rollout: int, count: int) -> NDArray[np.float64]:
    """float64[count] in [0, 1): number i decides token i of this rollout."""
    # Philox: the key separates seeds and prompts; the counter's highest word separates rollouts, 2**192 blocks apart.
    key = np.array([seed & _UINT64, position & _UINT64], dtype=np.uint64)
    counter = np.array([0, 0, 0, rollout], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).random(count)


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token for each row by inverse CDF, and its log-prob under the distribution it was drawn from.

    logits: float32[N, V], -inf where banned. uniform: float64[N]. Returns int64[N], float32[N].
    Temperature 0 takes the largest logit; its log-prob is that of temperature 1.
    A row without a proper distribution (NaN, +inf, everything banned) raises RolloutError.
    """
    log_probs = torch.log_softmax(logits / temperature if temperature else logits, dim=-1)
    if bool(log_probs[:, 0].isnan().any()):  # one bad logit makes its whole row NaN
        raise RolloutError(
            "the policy's logits are not finite; its weights have diverged or were not handed over whole"
        )
    if temperature:
        # float64 sums: near 1, float32 steps are larger than the probability of a rare token.
        cdf = log_probs.exp().double().cumsum(dim=-1)
        # Strictly right of equal values: a token of probability 0 adds nothing to the sum, so it is never the first
        # entry above the target. There is one: uniform <= 1 - 2**-53, so its product with the total rounds below that.
        tokens = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)
    else:
        tokens = logits.argmax(dim=-1, keepdim=True)
    return tokens[:, 0], log_probs.gather(1, tokens)[:, 0]


def check_sampling(sampling: Sampling, vocab_size: int) -> None:
    """Raise RolloutError for settings that no response can be drawn with."""
    if sampling.n < 1 or sampling.max_new_tokens < 1 or sampling.temperature < 0:
        raise RolloutError(
            f"sampling needs n >= 1, max_new_tokens >= 1, temperature >= 0, but has n {sampling.n}, "
            f"max_new_tokens {sampling.max_new_tokens}, temperature {sampling.temperature}"
        )
    strangers = [i for i in (*sampling.stop_token_ids, *sampling.banned_token_ids) if not 0 <= i < vocab_size]
    if strangers:
        raise RolloutError(
            f"stop or banned token ids {strangers[:10]} are outside the model's vocabulary of {vocab_size}; "
            "the tokenizer is not this model's"
        )
