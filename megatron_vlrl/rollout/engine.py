"""What writes answers: the protocol that every rollout engine fulfils."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from megatron_vlrl.types import Prompt, RolloutGroup, Sampling

if TYPE_CHECKING:
    from torch import Tensor


class Engine(Protocol):
    """Writes `sampling.n` responses to each prompt, with the log-probs it drew them with."""

    needs_weights: bool  # False: answers do not come from the policy, so nothing has to be handed over

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """One group for each prompt, in order.

        A response's draw depends on the seed, the prompt's position and the response's number alone.
        """
        ...

    def update_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Take the policy's weights, by Hugging Face name; a missing, extra or misshapen one raises RolloutError."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
