"""Rewards of a group: named parts, their sum, and failures that never turn into a 0."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_vlrl.config.schema import RewardConfig
from megatron_vlrl.errors import ConfigError, DataError
from megatron_vlrl.tasks import Task
from megatron_vlrl.tasks.reward import reward_group
from megatron_vlrl.types import Message, Prompt, RewardBreakdown, Rollout, RolloutGroup, Sample

RIGHT = "<think>count</think><answer>3</answer>"
WRONG = "<think>count</think><answer>4</answer>"
BROKEN = "<answer>3</answer>"


def _group(texts: list[str], task: str = "count", answer: object = "3", tokens: int = 6) -> RolloutGroup:
    messages = (Message(role="user", content="How many?"),)
    sample = Sample(key="k-1", task=task, messages=messages, images=(), answer=answer, position=0)
    prompt = Prompt(sample=sample, token_ids=(1, 2), positions=np.zeros((3, 2), np.int64), grids=(), patches=())
    rollout = Rollout(
        token_ids=(5,) * tokens,
        log_probs=np.zeros(tokens, np.float32),
        temperature=1.0,
        text="",
        finish_reason="stop",
        weight_version=0,
    )
    return RolloutGroup(prompt=prompt, rollouts=tuple(replace(rollout, text=text) for text in texts))


def _one(text: str, config: RewardConfig | None = None, **kwargs: object) -> RewardBreakdown:
    return reward_group(_group([text], **kwargs), config or RewardConfig())[0]


def test_parts_and_their_sum_in_order() -> None:
    right, wrong, broken = reward_group(_group([RIGHT, WRONG, BROKEN]), RewardConfig(format_weight=0.25))
    assert right.components == {"accuracy": 1.0, "format": 1.0}
    assert right.weights == {"accuracy": 0.75, "format": 0.25}
    assert (right.total, wrong.total, broken.total) == (1.0, 0.25, 0.0)
    assert broken.components == {"accuracy": 0.0, "format": 0.0}  # a right answer without its thinking
    assert broken.failure is None


def test_length_counts_tokens_or_characters_where_the_task_has_a_band() -> None:
    config = RewardConfig(format_weight=0.1, length_weight=0.2, length_bands={"count": (2, 4, 5, 7)})
    reward = _one(RIGHT, config)
    assert reward.components["length"] == 0.5  # 6 tokens
    assert reward.weights == pytest.approx({"accuracy": 0.7, "format": 0.1, "length": 0.2})
    assert reward.total == pytest.approx(0.7 + 0.1 + 0.2 * 0.5)

    in_chars = replace(config, length_unit="char", length_bands={"count": (0, len(RIGHT), len(RIGHT), 100)})
    assert _one(RIGHT, in_chars).components["length"] == 1.0

    assert _one(WRONG, config).components["length"] == 0.5
    assert _one(WRONG, replace(config, length_only_if_correct=True)).components["length"] == 0.0

    elsewhere = _one("<think></think><answer>7</answer>", config, task="pick", answer="7")
    assert elsewhere.weights == {"accuracy": 0.9, "format": 0.1}
    assert elsewhere.total == pytest.approx(1.0)


def test_a_band_out_of_order_is_a_mistake_of_the_run() -> None:
    with pytest.raises(ConfigError, match="out of order"):
        _one(RIGHT, RewardConfig(length_weight=0.1, length_bands={"count": (9, 4, 5, 7)}))


def _raises(answer: str, gold: object, meta: object) -> float:
    raise RuntimeError("verifier broke")


def _no_number(answer: str, gold: object, meta: object) -> float:
    return "good"  # type: ignore[return-value]


def _nan(answer: str, gold: object, meta: object) -> float:
    return math.nan


def _too_much(answer: str, gold: object, meta: object) -> float:
    return 1.5


def _negative(answer: str, gold: object, meta: object) -> float:
    return -0.25


def _refuses(gold: object) -> None:
    raise DataError("gold is no good")


def _crashes(gold: object) -> None:
    raise KeyError("colour")


BAD_GOLD = Task(name="bad gold", accuracy=_nan, check_gold=_refuses)
BAD_CHECK = Task(name="bad check", accuracy=_nan, check_gold=_crashes)


@pytest.mark.parametrize(
    ("verifier", "kind", "part"),
    [
        ("_raises", "error", "RuntimeError: verifier broke"),
        ("_no_number", "error", "could not convert"),
        ("_nan", "error", "accuracy nan is not in"),
        ("_too_much", "error", "accuracy 1.5 is not in"),
        ("_negative", "error", "accuracy -0.25 is not in"),
        ("BAD_GOLD", "invalid_gold", "gold is no good"),
        ("BAD_CHECK", "error", "KeyError: 'colour'"),
    ],
)
def test_a_failed_verifier_is_a_failure_with_no_total(verifier: str, kind: str, part: str) -> None:
    reward = _one(RIGHT, task=f"tests.test_tasks_reward:{verifier}")
    assert math.isnan(reward.total)
    assert reward.components == {"format": 1.0}
    assert reward.failure is not None
    assert reward.failure.kind == kind
    assert part in reward.failure.message
    assert "sample 'k-1'" in reward.failure.message


def test_gold_that_does_not_parse_fails_every_rollout() -> None:
    rewards = reward_group(_group([RIGHT, BROKEN], answer="many"), RewardConfig())
    assert [r.failure.kind for r in rewards if r.failure] == ["invalid_gold", "invalid_gold"]


def test_an_unknown_task_ends_the_run() -> None:
    with pytest.raises(ConfigError, match="unknown 'cuont'"):
        _one(RIGHT, task="cuont")
