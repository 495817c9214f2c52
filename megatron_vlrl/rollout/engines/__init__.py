"""The engines, one file each, and the table of their names.

A factory imports its engine when called: naming an engine must not need what the others are built on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from megatron_vlrl.config.names import resolve_name
from megatron_vlrl.config.schema import Config, RolloutConfig
from megatron_vlrl.errors import ConfigError
from megatron_vlrl.rollout.engine import Engine


class Codec(Protocol):
    """What an engine needs of the model's renderer."""

    def encode(self, text: str, /) -> tuple[int, ...]:
        """Response text -> token ids, nothing added."""
        ...

    def decode(self, ids: Sequence[int], /) -> str:
        """Response token ids, without the stop token -> text."""
        ...


# (Hugging Face folder, codec, settings, dtype of the weights: "float32" or "bfloat16") -> engine
EngineFactory = Callable[[Path, Codec, RolloutConfig, str], Engine]


def _transformers(folder: Path, codec: Codec, config: RolloutConfig, dtype: str) -> Engine:
    from megatron_vlrl.rollout.engines.transformers import TransformersEngine

    return TransformersEngine(folder, decode=codec.decode, batch_prompts=config.batch_prompts, dtype=dtype)


def _demonstrations(folder: Path, codec: Codec, config: RolloutConfig, dtype: str) -> Engine:
    from megatron_vlrl.rollout.engines.demonstrations import DemonstrationEngine

    return DemonstrationEngine(codec.encode, codec.decode)


ENGINES: dict[str, EngineFactory] = {
    "transformers": _transformers,
    "demonstrations": _demonstrations,
}


def make_engine(config: Config, codec: Codec) -> Engine:
    """The engine that `rollout.engine` names, with the weights of `model.path`."""
    factory = resolve_engine(config.rollout.engine)
    return factory(Path(config.model.path), codec, config.rollout, config.model.dtype)


def judge_config(config: Config) -> Config:
    """The configuration of the engine that evaluates: demonstrations say nothing of the policy."""
    if config.rollout.engine != "demonstrations":
        return config
    return replace(config, rollout=replace(config.rollout, engine="transformers"))


def resolve_engine(name: str) -> EngineFactory:
    """The factory of `rollout.engine`: a name in ENGINES or a user's `package.module:function`; else ConfigError."""
    factory = resolve_name(name, ENGINES, "rollout.engine")
    if not callable(factory):
        raise ConfigError(
            f"rollout.engine: {name!r} is a {type(factory).__name__}, not a function that makes an engine"
        )
    return factory
