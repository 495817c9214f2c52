"""What a kind of hardware provides to the trainer; the visible table of backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_vlrl.backends.protocol import Backend
from megatron_vlrl.config.names import resolve_name
from megatron_vlrl.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_vlrl.types import Sampling


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """Everything a backend is built from. sampling: whose banned tokens have no probability."""

    folder: Path
    model: ModelConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    sampling: Sampling
    seed: int

    @classmethod
    def of(cls, config: Config, sampling: Sampling) -> BackendOptions:
        """What a run's configuration says of it."""
        return cls(
            folder=Path(config.model.path),
            model=config.model,
            parallel=config.parallel,
            optimizer=config.optimizer,
            sampling=sampling,
            seed=config.run.seed,
        )


def _megatron(options: BackendOptions) -> Backend:
    from megatron_vlrl.backends.megatron.backend import MegatronBackend

    return MegatronBackend(options)


# Each imports its stack when called, so that none is forced on anyone.
BACKENDS: dict[str, Callable[[BackendOptions], Backend]] = {"megatron": _megatron}


def build_backend(options: BackendOptions) -> Backend:
    """The backend named in `options.model.backend`; torch.distributed must be initialised. Collective."""
    return resolve_name(options.model.backend, BACKENDS, "model.backend")(options)
