"""The seam between the trainer and a kind of hardware: what a backend must provide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from megatron_vlrl.config.schema import OptimizerConfig
    from megatron_vlrl.packing.rows import Microbatch
    from megatron_vlrl.parallel.groups import ProcessGroups


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenReport:
    """What a token loss measured on a microbatch: tensors of any shape to be summed element by element, and scalars of
    which the greatest counts. The same names and shapes for every microbatch."""

    sums: Mapping[str, Tensor]
    maxima: Mapping[str, Tensor]


# (microbatch, log_probs[R], entropies[R]) -> (scalar that is summed over microbatches and data ranks, report).
# R counts the response tokens of the microbatch; the loss already carries its global denominators.
TokenLoss = Callable[["Microbatch", "Tensor", "Tensor"], tuple["Tensor", TokenReport]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """log_probs, entropies: float32[R] on the host, in the order of the microbatch's response tokens."""

    log_probs: Tensor
    entropies: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateResult:
    """One optimizer update. sums, maxima: what the token loss reported, over the global batch; the same on every rank.

    sums["loss"] is the loss itself, float64[]. skipped: why weights and optimizer were left as they were, or None.
    """

    sums: Mapping[str, NDArray[np.float64]]
    maxima: Mapping[str, float]
    grad_norm: float
    skipped: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerStep:
    """What one update is taken with. lr: before a parameter's own factor. clip_norm: greatest norm of the whole
    gradient; 0: not clipped. weight_decay: of matrices; vectors have none."""

    lr: float
    clip_norm: float
    weight_decay: float

    @classmethod
    def of(cls, config: OptimizerConfig, *, lr: float) -> OptimizerStep:
        """A step's settings, and its learning rate."""
        return cls(lr=lr, clip_norm=config.clip_norm, weight_decay=config.weight_decay)


class Saving(Protocol):
    """Shards that are being written while training goes on."""

    def finished(self, *, wait: bool) -> bool:
        """Whether every rank's are written; wait: return when they are. Collective, not to be asked again once True.

        CheckpointError, on every rank, if any of them could not be written.
        """
        ...


class Backend(Protocol):
    """A model spread over processes, with its optimizer. Every method is collective: all ranks call it together."""

    groups: ProcessGroups

    def load_hf(self, folder: Path) -> None:
        """Take weights from a Hugging Face folder; a missing, extra or misshapen one raises ModelError."""
        ...

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor on the host), in a fixed order, on every rank; in bounded buckets."""
        ...

    def hf_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The gradients of the last update, after clipping, by the same names and in the same way."""
        ...

    def score(self, microbatches: Sequence[Microbatch], *, reference: bool = False) -> list[TokenScores]:
        """Log-probs and entropies of every response token, without gradient, on every rank of a model replica.

        reference: under the reference policy that `keep_reference` made; the policy itself is left as it is.
        """
        ...

    def keep_reference(self, *, moving: bool) -> None:
        """From now on hold a copy of the weights as they are now, the reference policy; an earlier one is dropped.

        moving: `move_reference` will move it, so it is held in float32 and saved with the rest. A frozen one is not
        saved: it is made anew from the weights that it was made from.
        """
        ...

    def move_reference(self, decay: float) -> None:
        """reference = decay * reference + (1 - decay) * policy, in float32."""
        ...

    def train_step(
        self, microbatches: Sequence[Microbatch], token_loss: TokenLoss, step: OptimizerStep
    ) -> UpdateResult:
        """Accumulate the microbatches' gradients over the data group, clip, and update, as `step` says."""
        ...

    def save(self, folder: Path, *, asynchronous: bool = False) -> Saving | None:
        """Write weights, optimizer and random state, as they are now, as shards into an empty folder; a moving
        reference too.

        None when all is written. asynchronous: only begin, and say what to ask whether it is done.
        """
        ...

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote; at another layout, all but the random state.

        A saved reference goes into a moving one, and is left out where none or a frozen one is kept. A kept one that
        was not saved stays as it is.
        """
        ...

    def close(self) -> None:
        """Free the model and its process groups."""
        ...
