"""The reward table of a step -> its advantages, with what their kind keeps from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_vlrl.algorithms import advantages, keeps_state
from megatron_vlrl.config.schema import AdvantageConfig
from megatron_vlrl.types import AdvantageResult, RewardTable


def estimate(table: RewardTable, config: AdvantageConfig, state: Mapping[str, Any]) -> AdvantageResult:
    """Advantages of all rows, the same bits on every rank. state: that of the step before; empty at the first."""
    kept = {"state": state} if keeps_state(config.kind) else {}
    return advantages(
        table.total,
        table.peers,
        table.position,
        config.kind,
        table.components,
        component_weights=table.weights,
        lengths=table.length,
        options={**config.options, **kept},
    )
