"""Say which layouts of a model fit on some devices, and what fills a rank's memory.

Nothing is built or downloaded: the numbers follow from the model's config and the lengths of a step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_vlrl.backends.plan import Layout, Plan
    from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec

_WIDTHS = {"bfloat16": 2, "float32": 4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--model", required=True, metavar="NAME|FOLDER", help="such as qwen3-vl-8b")
    parser.add_argument("--devices", required=True, metavar="COUNTxKIND", help="such as 8xh100-80g, trn1.32xlarge")
    numbers = {
        "prompts-per-step": (64, "over all replicas"),
        "prompt-tokens": (1024, "of a prompt, its image tokens included"),
        "response-tokens": (256, "of an answer"),
        "group": (8, "answers to a prompt"),
        "microbatch-tokens": (8192, "packed tokens of one forward pass; one group is never split"),
    }
    for name, (default, text) in numbers.items():
        parser.add_argument(
            f"--{name}", type=_positive, default=default, metavar="N", help=f"{text}; default {default}"
        )
    parser.add_argument("--image-tokens", type=int, metavar="N", help="of a prompt; default: all of it")
    parser.add_argument("--dtype", choices=_WIDTHS, default="bfloat16", help="of the weights; default bfloat16")
    parser.add_argument("--plain-optimizer", action="store_true", help="optimizer.distributed=false")
    parser.add_argument("--colocated", action="store_true", help="count the rollout engine's whole copy of the weights")
    parser.add_argument(
        "--reference", choices=("none", "frozen", "ema"), default="none", help="policy of a KL term; default none"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 0 if a layout fits, else 1."""
    from megatron_vlrl.backends.devices import parse_devices
    from megatron_vlrl.backends.memory import Training
    from megatron_vlrl.backends.plan import Work, make_plan
    from megatron_vlrl.errors import ConfigError

    spec = _model(arguments.model)
    count, device = parse_devices(arguments.devices)
    image = arguments.prompt_tokens if arguments.image_tokens is None else arguments.image_tokens
    if not 0 <= image <= arguments.prompt_tokens:
        raise ConfigError(f"--image-tokens is {image}; use 0 to --prompt-tokens, which is {arguments.prompt_tokens}")
    work = Work(
        prompts=arguments.prompts_per_step,
        prompt=arguments.prompt_tokens,
        image=image,
        group=arguments.group,
        response=arguments.response_tokens,
        budget=arguments.microbatch_tokens,
    )
    training = Training(
        width=_WIDTHS[arguments.dtype],
        distributed=not arguments.plain_optimizer,
        colocated=arguments.colocated,
        reference=arguments.reference,
    )
    plan = make_plan(spec, count, device, work, training)
    if arguments.json:
        print(json.dumps(as_json(plan, spec, arguments.model, arguments.devices, count), indent=2))
    else:
        devices = f"{arguments.devices}: {count} devices of {device.memory:.1f} GiB"
        print(as_text(plan, spec, f"{arguments.model} in {arguments.dtype} on {devices}"))
    return 0 if plan.layouts else 1


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _model(name: str) -> Qwen3VLSpec:
    """A size by its name, or the model of a folder."""
    from megatron_vlrl.config.names import unknown_name
    from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
    from megatron_vlrl.models.qwen3_vl.sizes import SIZES

    if name in SIZES:
        return SIZES[name]
    if not Path(name).is_dir():
        raise unknown_name(name, [*SIZES, "a Hugging Face folder"], "--model")
    return Qwen3VLSpec.load(Path(name))


def _settings(layout: Layout) -> dict[str, Any]:
    """The run's settings that ask for this layout."""
    dims, training = layout.dims, layout.training
    return {
        "parallel.tensor": dims.tensor,
        "parallel.pipeline": dims.pipeline,
        "parallel.virtual_pipeline": dims.virtual,
        "parallel.data": dims.data,
        "parallel.expert": dims.expert,
        "parallel.recompute": training.recompute,
        "parallel.recompute_vision": training.recompute_vision,
        "optimizer.distributed": training.distributed,
    }


def as_json(plan: Plan, spec: Qwen3VLSpec, model: str, devices: str, count: int) -> dict[str, Any]:
    """Everything of the plan; memory in bytes."""
    from megatron_vlrl.models.qwen3_vl.sizes import parameter_counts

    return {
        "model": model,
        "parameters": parameter_counts(spec),
        "devices": devices,
        "device_count": count,
        "limit_bytes": round(plan.limit),
        "layouts": [_layout_json(layout) for layout in plan.layouts],
        "too_large": [_layout_json(layout) for layout in plan.too_large],
        "impossible": list(plan.impossible),
    }


def _layout_json(layout: Layout) -> dict[str, Any]:
    return {
        "settings": _settings(layout),
        "bytes": {name: round(number) for name, number in layout.memory.parts().items()},
        "total_bytes": round(layout.memory.total),
        "cost": round(layout.cost, 3),
        "reasons": list(layout.reasons),
    }


def as_text(plan: Plan, spec: Qwen3VLSpec, title: str) -> str:
    """An aligned table of what fits, one of the nearest that do not, and the degrees that are not possible."""
    from megatron_vlrl.backends.plan import GIB, USABLE
    from megatron_vlrl.models.qwen3_vl.sizes import parameter_counts

    numbers = sum(parameter_counts(spec).values())
    limit = f"{plan.limit / GIB:.1f}"
    lines = [
        f"{title}; {numbers / 1e9:.2f} billion parameters",
        f"GiB on the fullest rank; {limit} of a device may be used ({USABLE:.0%})",
    ]
    if plan.layouts:
        lines += ["", f"fits, best first{_others(plan.layouts, _BEST, 'cost')}:", *_table(plan.layouts[:_BEST])]
    else:
        lines += ["", "no layout fits; more devices share weights, gradients and optimizer further, and fewer"]
        lines += ["--microbatch-tokens keep less text and vision"]
    if plan.too_large:
        others = _others(plan.too_large, _NEAREST, "need")
        lines += ["", f"needs more than {limit} whatever is recomputed{others}:", *_table(plan.too_large[:_NEAREST])]
    if plan.impossible:
        lines += ["", "not possible:", *(f"  {problem}" for problem in plan.impossible)]
    return "\n".join(lines)


_BEST, _NEAREST = 15, 5  # of the layouts that fit, and of those that do not


def _others(layouts: Sequence[Layout], shown: int, verb: str) -> str:
    more = len(layouts) - shown
    return f"; {more} others {verb} more than these" if more > 0 else ""


def _table(layouts: Sequence[Layout]) -> list[str]:
    """Columns that say nothing are left out: an engine or a reference that is not there, experts that the model has
    not."""
    rows = [_cells(layout) for layout in layouts]
    silent = {"rollout": "0.0", "reference": "0.0", "expert": "1", "virtual": "1", "because of": ""}
    names = [name for name in rows[0] if any(row[name] != silent.get(name) for row in rows)]
    lines = [{name: name for name in names}, *rows]
    widths = {name: max(len(line[name]) for line in lines) for name in names if name != "because of"}
    return ["  ".join(line[name].rjust(widths.get(name, 0)) for name in names).rstrip() for line in lines]


def _cells(layout: Layout) -> dict[str, str]:
    from megatron_vlrl.backends.plan import GIB

    dims, training = layout.dims, layout.training
    return {
        "tensor": str(dims.tensor),
        "pipeline": str(dims.pipeline),
        "virtual": str(dims.virtual),
        "data": str(dims.data),
        "expert": str(dims.expert),
        "recompute": training.recompute + ("+vision" if training.recompute_vision else ""),
        **{name: f"{number / GIB:.1f}" for name, number in layout.memory.parts().items()},
        "total": f"{layout.memory.total / GIB:.1f}",
        "cost": f"{layout.cost:.2f}",
        "because of": ", ".join(layout.reasons),
    }
