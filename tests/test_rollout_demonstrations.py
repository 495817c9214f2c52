"""The demonstration engine, and the table that names the engines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vlrl.config.schema import RolloutConfig
from megatron_vlrl.errors import ConfigError, RolloutError, SampleError
from megatron_vlrl.rollout.engines import ENGINES, resolve_engine
from megatron_vlrl.rollout.engines.demonstrations import DemonstrationEngine
from megatron_vlrl.types import Message, Prompt, Sample, Sampling


class Letters:
    """A codec of one token a letter."""

    def encode(self, text: str, /) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def decode(self, ids: Sequence[int], /) -> str:
        return "".join(map(chr, ids))


def prompt(meta: Mapping[str, Any], key: str = "count-1") -> Prompt:
    sample = Sample(
        key=key,
        task="count",
        messages=(Message(role="user", content="?"),),
        images=(),
        answer="3",
        position=0,
        meta=meta,
    )
    return Prompt(sample=sample, token_ids=(63,), positions=np.zeros((3, 1), dtype=np.int64), grids=(), patches=())


def settings(**change: Any) -> Sampling:
    return Sampling(**{"n": 1, "temperature": 1.0, "max_new_tokens": 8, "stop_token_ids": (1, 2), **change})


@pytest.fixture
def engine() -> DemonstrationEngine:
    return DemonstrationEngine(Letters().encode, Letters().decode)


def test_the_demonstration_is_the_one_rollout(engine: DemonstrationEngine) -> None:
    prompts = [prompt({"demonstration": text}) for text in ("three", "", "seven")]
    groups = engine.generate(prompts, settings())
    assert [g.prompt for g in groups] == prompts
    assert [r.text for g in groups for r in g.rollouts] == ["three", "", "seven"]
    first = groups[0].rollouts[0]
    assert first.token_ids == (*map(ord, "three"), 1)
    assert first.log_probs.tolist() == [0.0] * 6
    assert first.finish_reason == "stop"
    assert first.temperature == 1.0
    assert engine.generate(prompts[:1], settings(temperature=0.7))[0].rollouts[0].temperature == 0.7
    assert not engine.needs_weights


@pytest.mark.parametrize(
    ("meta", "change", "says"),
    [
        ({}, {}, "no text under"),
        ({"demonstration": 3}, {}, "no text under"),
        ({"demonstration": "a" * 8}, {}, "8 tokens and a stop token; rollout.max_new_tokens is 8"),
        ({"demonstration": "abc"}, {"banned_token_ids": (ord("b"),)}, r"\[98\]"),
        ({"demonstration": "a\x02"}, {}, r"\[2\]"),
    ],
)
def test_a_sample_without_a_usable_demonstration_is_named(
    engine: DemonstrationEngine, meta: Mapping[str, Any], change: dict[str, Any], says: str
) -> None:
    with pytest.raises(SampleError, match=says) as error:
        engine.generate([prompt(meta, key="read-9")], settings(**change))
    assert error.value.key == "read-9"


def test_settings_that_a_demonstration_cannot_meet(engine: DemonstrationEngine) -> None:
    with pytest.raises(RolloutError, match="samples_per_prompt to 1, not 8"):
        engine.generate([], settings(n=8))
    with pytest.raises(RolloutError, match="stop token"):
        engine.generate([], settings(stop_token_ids=()))


def make_silent(folder: Path, codec: Letters, config: RolloutConfig, dtype: str) -> str:
    """Stands for a user's factory."""
    return f"{folder}, {config.batch_prompts} prompts, {dtype}"


def test_engines_are_found_by_name_or_by_path() -> None:
    made = resolve_engine("demonstrations")(Path(), Letters(), RolloutConfig(), "float32")
    assert isinstance(made, DemonstrationEngine)
    own = resolve_engine("tests.test_rollout_demonstrations:make_silent")
    assert own(Path("hf"), Letters(), RolloutConfig(batch_prompts=3), "float32") == "hf, 3 prompts, float32"
    with pytest.raises(ConfigError, match="did you mean 'transformers'"):
        resolve_engine("transformer")
    with pytest.raises(ConfigError, match="is a tuple, not a function"):
        resolve_engine("tests.tiny:TEXT")
    assert "transformers" in ENGINES


def test_naming_the_engines_loads_none_of_them() -> None:
    code = "import sys, megatron_vlrl.rollout.engines; print({'torch', 'transformers', 'vllm'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
