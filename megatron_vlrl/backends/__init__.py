"""What a kind of hardware provides to the trainer; the visible table of backends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_vlrl.backends.protocol import Backend
from megatron_vlrl.config.names import resolve_name
from megatron_vlrl.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_vlrl.types import Sampling

# name -> "module:function" that takes a BackendOptions; imported when asked for, so that no stack is forced on anyone
BACKENDS: Mapping[str, str] = {"megatron": "megatron_vlrl.backends.megatron.backend:MegatronBackend"}


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """Everything a backend is built from. sampling: the distribution whose log-probs are computed."""

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


def build_backend(options: BackendOptions) -> Backend:
    """The backend named in `options.model.backend`; torch.distributed must be initialised. Collective."""
    path = resolve_name(options.model.backend, {**BACKENDS}, "model.backend")
    factory = resolve_name(path, {}, "model.backend") if isinstance(path, str) else path
    backend: Backend = factory(options)
    return backend
