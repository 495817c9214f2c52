"""How each task fared in the last steps: the records of a run and its settings in; one row a task out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_vlrl.observe.summary import WINDOW, pooled_mean
from megatron_vlrl.observe.svg import short_number

Record = Mapping[str, Any]

HEADINGS = (
    "task",
    "components",
    "advantage mean, variance, max",
    "uniform, tied",
    "effective N",
    "ranks decided by",
    "tokens (envelope)",
    "entropy (band)",
    "clipped",
    "mismatch KL",
)
_SHARES = ("accuracy", "format", "length")


def picture(metrics: Sequence[Record], tasks: Sequence[str], settings: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Cells for each of HEADINGS, a row a task, over the last steps; "-" where nothing was measured.

    settings: the run's config.yaml, for the bands that lengths and entropies are held against.
    """
    last = metrics[-WINDOW:]
    return [_row(last, task, settings) for task in tasks]


def _row(last: Sequence[Record], task: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    def mean(family: str) -> float | None:
        return pooled_mean(last, f"{family}/{task}")

    def texts(*families: str) -> str:
        return ", ".join(_text(mean(family)) for family in families)

    envelope = settings.get("reward", {}).get("length_bands", {}).get(task)
    band = settings.get("algorithm", {}).get("entropy", {}).get("bands", {}).get(task)
    decided = {
        name.removeprefix("decided_").removesuffix(f"/{task}"): pooled_mean(last, name)
        for name in dict.fromkeys(key for record in last for key in record)
        if name.startswith("decided_") and name.endswith(f"/{task}")
    }
    parts = [f"{name} {_text(mean(name))}" for name in _SHARES if mean(name) is not None]
    return (
        task,
        ", ".join(parts) or "-",
        f"{texts('advantage', 'advantage_var')}, {_text(_scalar(last, f'advantage_max/{task}', max))}",
        ", ".join(_percent(mean(family)) for family in ("uniform", "tied")),
        _text(_scalar(last, f"effective_n/{task}", lambda values: sum(values) / len(values))),
        ", ".join(f"{name} {_percent(share)}" for name, share in decided.items()) or "-",
        _with_band(mean("response_length"), envelope, _outside(mean("under_envelope"), mean("over_envelope"))),
        _with_band(mean("entropy"), band, _side(mean("entropy_side"))),
        _percent(mean("clip_fraction")),
        _text(mean("mismatch_kl")),
    )


def _scalar(last: Sequence[Record], name: str, join: Any) -> float | None:
    values = [record[name] for record in last if record.get(name) is not None]
    return join(values) if values else None


def _text(value: float | None) -> str:
    return "-" if value is None else short_number(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def _with_band(value: float | None, band: Sequence[float] | None, note: str) -> str:
    if band is None or value is None:
        return _text(value)
    limits = " to ".join(short_number(limit) for limit in (band[0], band[-1]))
    return f"{_text(value)} ({limits}{note})"


def _outside(under: float | None, over: float | None) -> str:
    return "" if under is None or over is None else f"; {_percent(under)} short, {_percent(over)} long of its flat part"


def _side(mean: float | None) -> str:
    """mean: of +1 above the band, -1 below, 0 inside, over the steps."""
    return "" if not mean else f"; pushed {'down' if mean > 0 else 'up'}"
