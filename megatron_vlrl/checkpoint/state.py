"""What a run must know, besides tensors and random state, to continue as if never interrupted; JSON-like, torch-free.

In: the loop's counters, the data cursor, the algorithm's state, the settings. Out: the `extra` that a backend stores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_vlrl.config.schema import Config
from megatron_vlrl.errors import CheckpointError
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec

STATE_FILE = "run_state.json"  # in a checkpoint's folder
VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """step: steps done, so also the number of the next one. updates: optimizer updates done, skipped ones left out.

    cursor: the data stream's own. algorithm: state of schedules and shaping. model, config: flat summaries
    (`section.key` -> value) of the Qwen3VLSpec and the Config that the run had.

    Example: RunState(step=12, updates=24, cursor=stream.state(), algorithm={}, model=summary(spec),
                      config=summary(config))
    """

    step: int
    updates: int
    cursor: Mapping[str, Any]
    algorithm: Mapping[str, Any]
    model: Mapping[str, Any]
    config: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-like, with a version; CheckpointError if the cursor or the algorithm holds what JSON would change."""
        raw = {"version": VERSION, **asdict(self)}
        for name, value in raw.items():
            try:
                same = json.loads(json.dumps(value)) == value
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"{name} of the run state is not JSON-like: {error}") from error
            if not same:
                raise CheckpointError(
                    f"{name} of the run state would come back changed; use lists for tuples, strings for keys, no NaN"
                )
        return raw

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, model: Mapping[str, Any]) -> RunState:
        """Read `to_dict`'s result; CheckpointError if it is of another version, incomplete, or not of `model`."""
        if raw.get("version") != VERSION:
            raise CheckpointError(
                f"the checkpoint's run state has version {raw.get('version')!r}; this program reads {VERSION}. "
                "Resume with the release that wrote it, or start from its weights with run.resume=never"
            )
        expected = set(cls.__dataclass_fields__) | {"version"}
        if set(raw) != expected:
            raise CheckpointError(
                f"the checkpoint's run state is damaged: {sorted(set(raw) ^ expected)} missing or too many; "
                "resume from another checkpoint"
            )
        state = cls(**{name: value for name, value in raw.items() if name != "version"})
        changed = differences(state.model, model)
        if changed:
            raise CheckpointError(
                f"the checkpoint is of another model: {'; '.join(changed)}. Set model.path to the model it was "
                "trained from, or run.resume=never"
            )
        return state


def summary(settings: Config | Qwen3VLSpec) -> dict[str, Any]:
    """A dataclass as one flat level, `section.key` -> JSON value, so that two can be compared key by key."""
    return dict(_flatten("", json.loads(json.dumps(asdict(settings)))))


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name: was A, now B` for every name whose value differs or that only one side has, sorted."""
    names = sorted(name for name in {*then, *now} if then.get(name, "absent") != now.get(name, "absent"))
    return [f"{name}: was {then.get(name, 'absent')}, now {now.get(name, 'absent')}" for name in names]


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flatten(f"{prefix}.{name}" if prefix else name, inner)
    else:
        yield prefix, value
