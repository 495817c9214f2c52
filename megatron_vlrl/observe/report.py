"""A run as one page: the records in its folder in; report.html out, readable without a network.

It holds the table of what was learned, curves, rollouts with their images, and the settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_vlrl.config.yaml_format import read_yaml
from megatron_vlrl.observe import jsonl
from megatron_vlrl.observe.metrics import read_metrics
from megatron_vlrl.observe.page import document, escape, inline_image, row, section, table
from megatron_vlrl.observe.picture import HEADINGS as PICTURE
from megatron_vlrl.observe.picture import picture
from megatron_vlrl.observe.records import read_evaluations, read_rollouts
from megatron_vlrl.observe.summary import HEADINGS, WINDOW, cells, summarize, task_names
from megatron_vlrl.observe.svg import Series, line_chart, short_number

REPORT_FILE = "report.html"
CONFIG_FILE = "config.yaml"
_SHOWN_STEPS = 12  # steps whose rollouts are shown: the first, the last and some evenly between

Record = Mapping[str, Any]
_CURVES = {
    "response_length": "Response length, tokens",
    "entropy": "Entropy, nats a token",
    "mismatch_kl": "KL of sampler to trainer",
    "grad_norm": "Gradient norm",
}
# Metrics `family/member` whose members are no tasks.
_FAMILIES = {"seconds": "Seconds by stage", "balance": "Work of the busiest data rank, mean = 1"}


def write_report(folder: Path) -> Path:
    """Build `folder`/report.html from the run's records; whatever is missing is said on the page. Returns its path."""
    metrics, evaluations = read_metrics(folder), read_evaluations(folder)
    parts = [
        _header(folder.resolve().name, metrics),
        section("learned", "What was learned", _learned(metrics, evaluations)),
        section("tasks", "Tasks", _tasks(metrics, evaluations, folder / CONFIG_FILE)),
        section("curves", "Training", _training_charts(metrics)),
        section("rollouts", "Rollouts", _rollouts(folder, read_rollouts(folder))),
        section("settings", "Settings", _settings(folder / CONFIG_FILE)),
    ]
    path = folder / REPORT_FILE
    jsonl.replace(path, document(folder.resolve().name, "".join(parts)))
    return path


def _header(name: str, metrics: Sequence[Record]) -> str:
    skipped = [record for record in metrics if record["skipped"] is not None]
    seconds = sum(value or 0 for record in metrics for key, value in record.items() if key.startswith("seconds/"))
    facts = {"steps": str(len(metrics)), "skipped": str(len(skipped)), "minutes in steps": f"{seconds / 60:.1f}"}
    items = "".join(f"<li><b>{escape(value)}</b>{escape(label)}</li>" for label, value in facts.items())
    links = "".join(f'<a href="#{part}">{part}</a>' for part in ("learned", "tasks", "curves", "rollouts", "settings"))
    notes = "".join(
        f'<p class="alarm">step {record["step"]} skipped: {escape(record["skipped"])}</p>' for record in skipped[:10]
    )
    return f'<h1>{escape(name)}</h1><ul class="facts">{items}</ul><nav>{links}</nav>{notes}'


def _learned(metrics: Sequence[Record], evaluations: Sequence[Record]) -> str:
    summary = summarize(metrics, evaluations)
    last = len(summary.rows) - 1
    rows = [row(cells(one), kind="total" if i == last else "") for i, one in enumerate(summary.rows)]
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in summary.reasons)
    note = (
        "Accuracies. Rollouts: on training prompts, as sampled. Held-out: greedy, on items that training never shows, "
        "± half the width of the 95% interval."
    )
    return f'<div class="card">{table(HEADINGS, rows)}</div><p class="muted">{note}</p><ul class="muted">{reasons}</ul>'


def _curve(metrics: Sequence[Record], key: str, name: str) -> Series:
    return Series(name=name, points=[(record["step"], record.get(key)) for record in metrics])


def _tasks(metrics: Sequence[Record], evaluations: Sequence[Record], config: Path) -> str:
    settings = (read_yaml(config.read_text(encoding="utf-8")) if config.is_file() else None) or {}
    cells = picture(metrics, task_names(metrics, evaluations), settings)
    note = f"Over the last {min(WINDOW, len(metrics))} steps."
    rows = "".join(row(one) for one in cells)
    shown = f'<div class="card">{table(PICTURE, [rows])}</div><p class="muted">{note}</p>' if metrics else ""
    return shown + _task_charts(metrics, evaluations)


def _task_charts(metrics: Sequence[Record], evaluations: Sequence[Record]) -> str:
    charts = []
    greedy = [record for record in evaluations if record["temperature"] == 0]
    for task in task_names(metrics, evaluations):
        points = [(record["step"], record["tasks"][task]["accuracy"]) for record in greedy if task in record["tasks"]]
        series = [
            _curve(metrics, f"accuracy/{task}", "accuracy"),
            _curve(metrics, f"reward/{task}", "reward"),
            Series(name="held-out accuracy", points=points, dots=True),
        ]
        charts.append(line_chart(task, [one for one in series if one.known()], limits=(0, 1)))
    return f'<div class="charts">{"".join(charts)}</div>'


def _training_charts(metrics: Sequence[Record]) -> str:
    """One chart for each metric; those of the tasks (`length/count`) share one, a line for each."""
    names = dict.fromkeys(key for record in metrics for key in record)
    hidden = ("step", "time", "skipped", "counts", *_CURVES)
    families: dict[str, list[Series]] = {}
    for name in (name for name in names if name not in hidden):
        family, _, member = name.partition("/")
        if family not in ("reward", "accuracy"):  # the tasks' own charts have them
            title = _FAMILIES.get(family, f"{family} by task") if member else family
            families.setdefault(title, []).append(_curve(metrics, name, member or name))
    seconds = families.pop(_FAMILIES["seconds"], [])
    charts = [line_chart(title, [_curve(metrics, key, key)], limits=(0, 0)) for key, title in _CURVES.items()]
    charts.append(line_chart(_FAMILIES["seconds"], seconds, limits=(0, 0)))
    charts += [line_chart(title, series) for title, series in families.items()]
    return f'<div class="charts">{"".join(charts)}</div>'


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """The first, the last and evenly spaced ones between; all of them when they are few."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _rollouts(folder: Path, records: Sequence[Record]) -> str:
    steps = [(step, list(groups)) for step, groups in groupby(records, key=lambda record: record["step"])]
    shown = _spread(steps, _SHOWN_STEPS)
    if not shown:
        return '<p class="muted">No rollouts were kept.</p>'
    text = f"Rollouts of {len(shown)} of the {len(steps)} steps that kept some; all are in rollouts.jsonl."
    parts = []
    for step, groups in shown:
        is_open = " open" if step in (shown[0][0], shown[-1][0]) else ""
        body = "".join(_group(folder, group) for group in groups)
        parts.append(f"<details{is_open}><summary>Step {step}</summary><div>{body}</div></details>")
    return f'<p class="muted">{text}</p>{"".join(parts)}'


def _group(folder: Path, group: Record) -> str:
    images = "".join(inline_image(folder / name) for name in group["images"])
    prompt = "".join(_named(message["role"], message["content"]) for message in group["prompt"])
    components = list(dict.fromkeys(name for rollout in group["rollouts"] for name in rollout["components"]))
    headings = ("response", "tokens", *components, "reward", "advantage")
    rows = [_rollout(rollout, components) for rollout in group["rollouts"]]
    head = f'<p class="prompt"><b>{escape(group["task"])}</b> <span class="muted">{escape(group["key"])}</span></p>'
    gold = _named("gold answer", group["answer"])
    return f'<div class="group"><div>{images}</div><div>{head}{prompt}{gold}{table(headings, rows)}</div></div>'


def _named(name: str, text: object) -> str:
    return f'<p class="prompt"><span class="muted">{escape(name)}</span> <span class="text">{escape(text)}</span></p>'


def _rollout(rollout: Record, components: Sequence[str]) -> str:
    advantage = rollout["advantage"]
    colour = "" if not advantage else "good" if advantage > 0 else "bad"
    numbers = [_number(rollout["components"].get(name)) for name in components]
    failure = rollout["failure"]
    failed = "" if failure is None else f'<p class="alarm">{escape(failure["kind"])}: {escape(failure["message"])}</p>'
    cut = ' <span class="muted">(cut at the limit)</span>' if rollout["finish_reason"] == "length" else ""
    text = f'<td><span class="text">{escape(rollout["text"])}</span>{cut}{failed}</td>'
    rest = "".join(f"<td>{escape(cell)}</td>" for cell in (rollout["tokens"], *numbers, _number(rollout["total"])))
    return f'<tr>{text}{rest}<td class="{colour}">{_number(advantage, "+.2f")}</td></tr>'


def _number(value: float | None, form: str = "") -> str:
    if value is None:
        return "-"
    return format(value, form) if form else short_number(value)


def _settings(path: Path) -> str:
    if not path.exists():
        return f'<p class="muted">The folder has no {escape(path.name)}.</p>'
    text = path.read_text(encoding="utf-8", errors="replace")
    return f"<details><summary>{escape(path.name)}</summary><pre>{escape(text)}</pre></details>"
