"""Say which layouts of a model fit on some devices, and what fills a rank's memory.

Nothing is built or downloaded: the numbers follow from the model's config and the lengths of a step.
"""

from __future__ import annotations

import argparse
import json
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
        parser.add_argument(f"--{name}", type=_positive, default=default, metavar="N", help=f"{text}; default {default}")
    parser.add_argument("--image-tokens", type=int, metavar="N", help="of a prompt; default: all of it")
    parser.add_argument("--dtype", choices=_WIDTHS, default="bfloat16", help="of the weights; default bfloat16")
    parser.add_argument("--plain-optimizer", action="store_true", help="optimizer.distributed=false")
    parser.add_argument("--colocated", action="store_true", help="count the rollout engine's whole copy of the weights")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 0 if a layout fits, else 1."""
    from megatron_vlrl.backends.devices import parse_devices
    from megatron_vlrl.backends.memory import Training
    from megatron_vlrl.backends.plan import Work, make_plan
    from megatron_vlrl.errors import ConfigError

    spec = _model(arguments.model)
    kind, count, device = parse_devices(arguments.devices)
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
        width=_WIDTHS[arguments.dtype], distributed=not arguments.plain_optimizer, colocated=arguments.colocated
    )
    plan = make_plan(spec, count, device, work, training)
    if arguments.json:
        print(json.dumps(as_json(plan, spec, arguments.model, f"{count}x{kind}"), indent=2))
    else:
        print(as_text(plan, spec, arguments, f"{count} x {kind} ({device.memory:.1f} GiB each)"))
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
        "parallel.data": dims.data,
        "parallel.expert": dims.expert,
        "parallel.recompute": training.recompute,
        "parallel.recompute_vision": training.recompute_vision,
        "optimizer.distributed": training.distributed,
    }


def as_json(plan: Plan, spec: Qwen3VLSpec, model: str, devices: str) -> dict[str, Any]:
    """Everything of the plan; memory in bytes."""
    from megatron_vlrl.models.qwen3_vl.sizes import parameter_counts

    return {
        "model": model,
        "parameters": parameter_counts(spec),
        "devices": devices,
        "limit_bytes": round(plan.limit),
        "layouts": [
            {
                "settings": _settings(layout),
                "bytes": {name: round(number) for name, number in layout.memory.parts().items()},
                "total_bytes": round(layout.memory.total),
                "cost": round(layout.cost, 3),
                "reasons": list(layout.reasons),
            }
            for layout in plan.layouts
        ],
        "refusals": list(plan.refusals),
    }


def as_text(plan: Plan, spec: Qwen3VLSpec, arguments: argparse.Namespace, devices: str) -> str:
    """An aligned table, GiB on the fullest rank, and the refusals under it."""
    from megatron_vlrl.backends.plan import GIB, USABLE
    from megatron_vlrl.models.qwen3_vl.sizes import parameter_counts

    numbers = sum(parameter_counts(spec).values())
    engine = "its rollout engine beside it" if arguments.colocated else "no rollout engine on the same devices"
    lines = [
        f"{arguments.model}: {numbers / 1e9:.2f} billion parameters, {arguments.dtype}, on {devices}, {engine}",
        f"GiB on the fullest rank; up to {plan.limit / GIB:.1f} are used ({USABLE:.0%})",
    ]
    table = [_HEAD, *([str(n), *_cells(layout)] for n, layout in enumerate(plan.layouts, 1))]
    widths = [max(len(row[column]) for row in table) for column in range(len(_HEAD) - 1)]
    for row in table if plan.layouts else []:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    if not plan.layouts:
        lines.append("no layout fits")
    lines += ["not possible:", *(f"  {refusal}" for refusal in plan.refusals)] if plan.refusals else []
    return "\n".join(lines)


_HEAD = [
    *("#", "tensor", "pipeline", "data", "expert", "recompute"),
    *("weights", "gradients", "optimizer", "text", "vision", "head", "rollout", "total", "cost", "because of"),
]


def _cells(layout: Layout) -> list[str]:
    from megatron_vlrl.backends.plan import GIB

    dims, training = layout.dims, layout.training
    recompute = training.recompute + ("+vision" if training.recompute_vision else "")
    memory = [*layout.memory.parts().values(), layout.memory.total]
    return [
        *map(str, (dims.tensor, dims.pipeline, dims.data, dims.expert)),
        recompute,
        *(f"{number / GIB:.1f}" for number in memory),
        f"{layout.cost:.2f}",
        ", ".join(layout.reasons),
    ]
