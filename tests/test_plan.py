"""`plan` says what fits, in which order, and why the rest does not; for people and for programs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vlrl.backends.devices import DEVICES, Device, parse_devices
from megatron_vlrl.backends.layout import check_layout
from megatron_vlrl.backends.memory import Training, fullest_rank
from megatron_vlrl.backends.plan import GIB, USABLE, Layout, Plan, Work, make_plan
from megatron_vlrl.cli import main
from megatron_vlrl.config.load import keys
from megatron_vlrl.errors import ConfigError
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.models.qwen3_vl.cost import group_cost, unit_costs
from megatron_vlrl.models.qwen3_vl.sizes import SIZES, parameter_counts
from megatron_vlrl.parallel.dims import ParallelDims
from tests.groups import make_group
from tests.spec import SPEC
from tests.tiny import make_tiny
from tools.pages import code_block, replace_parts

ROOT = Path(__file__).resolve().parent.parent

WORK = Work(prompts=64, prompt=1024, image=1024, group=8, response=256, budget=8192)
TINY = Work(prompts=8, prompt=64, image=16, group=4, response=32, budget=512)


def plan(spec: Qwen3VLSpec, devices: str, work: Work = WORK, training: Training | None = None) -> Plan:
    return make_plan(spec, *parse_devices(devices), work, training or Training())


def degrees(plan: Plan) -> list[tuple[int, int, int]]:
    return [(layout.dims.tensor, layout.dims.pipeline, layout.dims.data) for layout in plan.layouts]


def of_memory(gib: float) -> Device:
    return Device(memory=gib, machine=8)


@pytest.mark.parametrize("name", SIZES)
def test_every_layout_uses_all_devices_and_fits(name: str) -> None:
    found = plan(SIZES[name], "64xh200-141g")
    assert found.layouts
    for layout in found.layouts:
        assert layout.dims.world == 64
        assert layout.memory.total <= found.limit == 139.8 * GIB * USABLE
    for layout in found.too_large:
        assert layout.memory.total > found.limit
        assert (layout.training.recompute, layout.training.recompute_vision) == ("full", True)
    costs = [layout.cost for layout in found.layouts]
    assert costs == sorted(costs)


def test_nothing_is_recomputed_without_need() -> None:
    roomy = make_plan(SPEC, 1, of_memory(80), TINY, Training())
    [layout] = roomy.layouts
    assert (layout.training.recompute, layout.training.recompute_vision) == ("none", False)
    assert layout.cost == 1.0
    assert layout.reasons == ()
    tight = of_memory((layout.memory.total - 1) / USABLE / GIB)
    [squeezed] = make_plan(SPEC, 1, tight, TINY, Training()).layouts
    assert squeezed.training.recompute != "none" or squeezed.training.recompute_vision
    assert squeezed.cost > 1.0


def test_more_memory_never_fits_less() -> None:
    spec = SIZES["qwen3-vl-8b"]
    small, large = (make_plan(spec, 8, of_memory(gib), WORK, Training()) for gib in (40, 80))
    assert set(degrees(small)) < set(degrees(large))
    assert {len(p.layouts) + len(p.too_large) for p in (small, large)} == {len(large.layouts) + len(large.too_large)}


def test_replicas_come_before_cutting_where_all_fits() -> None:
    found = make_plan(SPEC, 4, of_memory(80), TINY, Training())
    assert degrees(found)[0] == (1, 1, 4)
    assert found.layouts[0].reasons == ()


def layout_of(found: Plan, tensor: int, pipeline: int) -> Layout:
    [layout] = [each for each in found.layouts if (each.dims.tensor, each.dims.pipeline) == (tensor, pipeline)]
    return layout


# Of 64 prompt tokens, 64 patches (16 tokens) and 4 answers of 32 tokens: the group that TINY is made of.
UNIT = unit_costs(SPEC)
GROUP = make_group(0, [32] * 4, prompt=64, grids=[8])
TOTAL = group_cost(GROUP, UNIT)
VISION = group_cost(GROUP, replace(UNIT, token=0, pair=0, logit=0))
HEAD = group_cost(GROUP, replace(UNIT, token=0, pair=0, patch=0, patch_pair=0))
ATTENTION = group_cost(GROUP, replace(UNIT, token=0, logit=0, patch=0, patch_pair=0))


def test_costs_are_named() -> None:
    found = make_plan(SPEC, 4, of_memory(80), replace(TINY, budget=1), Training())
    assert layout_of(found, 2, 1).reasons == ("tensor x1.05",)
    # 4 microbatches of a replica, 1 more to fill the pipeline, but of half a rank's layers; 4 stages of 1 layer each.
    two_stages = layout_of(found, 1, 2)
    uneven = 2 * ((TOTAL - VISION - HEAD) / 2 + max(VISION, HEAD)) / TOTAL
    assert two_stages.dims.virtual == 2
    assert two_stages.reasons == (f"uneven x{uneven:.2f}", "borders x1.05", "bubble x1.12")
    assert two_stages.cost == pytest.approx(uneven * 1.05 * 1.125)
    idle = make_plan(SPEC, 4, of_memory(80), replace(TINY, prompts=3), Training()).layouts
    assert any("idle x1.33" in layout.reasons for layout in idle)


def squeezed(spec: Qwen3VLSpec, devices: int, work: Work, pipeline: int) -> Iterator[Layout]:
    """The chosen layout of so many stages, on devices of ever less memory until none fits."""
    device = of_memory(80)
    while found := [
        layout
        for layout in make_plan(spec, devices, device, work, Training()).layouts
        if (layout.dims.tensor, layout.dims.pipeline) == (1, pipeline)
    ]:
        yield found[0]
        device = of_memory((found[0].memory.total - 1) / USABLE / GIB)


def test_recompute_costs_what_a_group_costs() -> None:
    again = {"none": 0.0, "selective": ATTENTION, "full": TOTAL - VISION - HEAD}
    found = list(squeezed(SPEC, 1, TINY, 1))
    assert {layout.training.recompute for layout in found} == set(again)
    for layout in found:
        vision = VISION if layout.training.recompute_vision else 0
        assert layout.cost == pytest.approx(1 + (again[layout.training.recompute] + vision) / TOTAL / 3)


def test_stages_interleave_where_the_bubble_costs_more_than_their_messages() -> None:
    few, many = (
        layout_of(make_plan(SPEC, 2, of_memory(80), replace(TINY, prompts=prompts, budget=1), Training()), 1, 2)
        for prompts in (4, 40)
    )
    assert (few.dims.virtual, many.dims.virtual) == (2, 1)
    assert few.reasons[-1] == "bubble x1.12"
    assert many.reasons[-1] == "bubble x1.02"  # with 2 chunks 1.01, but then borders are 1.05 and not 1.02


def test_an_interleaved_schedule_takes_whole_turns() -> None:
    [layout] = [
        each
        for each in make_plan(SPEC, 2, of_memory(80), replace(TINY, prompts=3, budget=1), Training()).layouts
        if each.dims.pipeline == 2
    ]
    assert layout.dims.virtual == 1  # as 4 of 3 microbatches would cost more than the bubble of 3
    assert layout.reasons[-1] == "bubble x1.33"


def test_only_what_the_layout_check_allows_is_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    def strict(spec: Qwen3VLSpec, dims: ParallelDims) -> None:
        check_layout(spec, dims)
        if dims.virtual > 1:
            raise ConfigError("not here (of all places)")

    monkeypatch.setattr("megatron_vlrl.backends.plan.check_layout", strict)
    assert {layout.dims.virtual for layout in plan(SIZES["qwen3-vl-8b"], "64xh200-141g").layouts} == {1}


def test_memory_is_that_of_as_many_microbatches_as_there_are() -> None:
    found = make_plan(SPEC, 4, of_memory(80), replace(TINY, prompts=2, budget=1), Training())
    [layout] = [each for each in found.layouts if each.dims.pipeline == 4]
    row = replace(TINY, budget=1).row(1)
    assert layout.dims.virtual == 1  # 2 microbatches
    assert layout.memory == fullest_rank(SPEC, layout.dims, row, layout.training, 2)
    assert layout.memory.total < fullest_rank(SPEC, layout.dims, row, layout.training).total


def test_interleaving_gives_way_to_memory() -> None:
    found = list(squeezed(SPEC, 2, replace(TINY, prompts=4, budget=1), 2))
    assert [layout.dims.virtual for layout in (found[0], found[-1])] == [2, 1]
    costs, totals = [layout.cost for layout in found], [layout.memory.total for layout in found]
    assert costs == sorted(costs)
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("name", SIZES)
def test_every_layout_can_be_built(name: str) -> None:
    found = plan(SIZES[name], "64xh200-141g")
    for layout in found.layouts + found.too_large:
        check_layout(SIZES[name], layout.dims)
    chunks = {layout.dims.virtual for layout in found.layouts if layout.dims.pipeline > 1}
    assert max(chunks) > 1
    assert {layout.dims.virtual for layout in found.layouts if layout.dims.pipeline == 1} == {1}


def test_impossible_degrees_are_explained_once() -> None:
    found = plan(SIZES["qwen3-vl-8b"], "trn1.32xlarge")
    assert [text.partition(";")[0] for text in found.impossible] == [
        "parallel.tensor=16 does not divide 8 key/value heads",
        "parallel.tensor=32 does not divide 8 key/value heads, 16 vision heads, 4304 vision feed-forward width",
        *(f"parallel.pipeline={n} x virtual_pipeline=1 does not divide 36 layers" for n in (8, 16, 32)),
    ]
    assert all(layout.dims.tensor <= 8 for layout in found.layouts + found.too_large)


def test_tensor_stays_inside_a_machine() -> None:
    found = make_plan(SIZES["qwen3-vl-8b"], 8, Device(memory=80, machine=4), WORK, Training())
    assert any(text.startswith("parallel.tensor=8 reaches over machines of 4") for text in found.impossible)
    assert max(layout.dims.tensor for layout in found.layouts) == 4


def test_only_mixtures_share_experts() -> None:
    assert {layout.dims.expert for layout in plan(SIZES["qwen3-vl-8b"], "8xh100-80g").layouts} == {1}
    experts = {layout.dims.expert for layout in plan(SIZES["qwen3-vl-30b-a3b"], "32xh100-80g").layouts}
    assert experts >= {2, 4, 8, 16}


def test_distributed_optimizer_engine_and_reference_count() -> None:
    spec = SIZES["qwen3-vl-2b"]
    costly = (Training(distributed=False), Training(colocated=True), Training(reference="frozen"))
    for change, worse in (*((change, True) for change in costly), (Training(), False)):
        pairs = zip(*(plan(spec, "8xh200-141g", training=t).layouts for t in (Training(), change)), strict=True)
        wide = [(a, b) for a, b in pairs if a.dims.data > 1 and a.dims == b.dims]
        assert wide
        assert all((b.memory.total > a.memory.total) == worse for a, b in wide)


@pytest.mark.parametrize(
    ("text", "count", "kind"),
    [("8xh100-80g", 8, "h100-80g"), ("h100-80g", 1, "h100-80g"), ("2xtrn1.32xlarge", 64, "trn1.32xlarge")],
)
def test_devices(text: str, count: int, kind: str) -> None:
    assert parse_devices(text) == (count, DEVICES[kind])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8xh10-80g", "--devices: unknown 'h10-80g'; did you mean 'h100-80g'?"),
        ("0xh100-80g", "is not COUNTxKIND such as 8xh100-80g"),
        ("", "is not COUNTxKIND"),
    ],
)
def test_unknown_devices(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        parse_devices(text)


def test_text_shows_what_fits_and_what_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "qwen3-vl-8b", "--devices", "trn1.32xlarge"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("qwen3-vl-8b in bfloat16 on trn1.32xlarge: 32 devices of 16.0 GiB; 8.77 billion parameters")
    for part in ("fits, best first:", "needs more than 14.4 whatever is recomputed", "not possible:"):
        assert part in text
    table = text.partition("fits, best first:\n")[2].splitlines()
    ends = [line.find(column) + len(column) for line, column in ((table[0], "total"), (table[0], "tensor"))]
    assert all(line[end - 1].isdigit() for line in table[1:3] for end in ends)  # columns are aligned
    assert "rollout" not in text
    assert "reference" not in text
    assert "expert" not in text
    main(["plan", "--model", "qwen3-vl-8b", "--devices", "trn1.32xlarge", "--reference", "ema"])
    assert "reference" in capsys.readouterr().out


def test_text_shows_interleaving_where_there_is_any(capsys: pytest.CaptureFixture[str]) -> None:
    for devices, shown in (("8xh100-80g", True), ("h200-141g", False)):
        assert main(["plan", "--model", "qwen3-vl-4b", "--devices", devices]) == 0
        assert ("virtual" in capsys.readouterr().out.partition("not possible")[0]) == shown


def test_text_shows_the_best_only(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--model", "qwen3-vl-30b-a3b", "--devices", "64xh100-80g"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert main([*argv, "--json"]) == 0
    fitting = len(json.loads(capsys.readouterr().out)["layouts"])
    assert f"fits, best first; {fitting - 15} others cost more than these:" in text
    table = text.partition("than these:\n")[2].partition("\n\n")[0].splitlines()
    assert len(table) == 1 + 15


def test_json_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "qwen3-vl-30b-a3b", "--devices", "8xh100-80g", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [
        *("model", "parameters", "devices", "device_count", "limit_bytes", "layouts", "too_large", "impossible")
    ]
    assert sum(found["parameters"].values()) == 31_070_754_032
    for layout in found["layouts"]:
        assert list(layout) == ["settings", "bytes", "total_bytes", "cost", "reasons"]
        assert set(layout["settings"]) <= set(keys())  # a run takes them as they are
        assert sum(layout["bytes"].values()) == pytest.approx(layout["total_bytes"], abs=8)
        assert layout["total_bytes"] <= found["limit_bytes"]


def test_folder_is_planned_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_tiny(tmp_path / "model")
    assert main(["plan", "--model", str(folder), "--devices", "h100-80g", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layouts"][0]["settings"]["parallel.recompute"] == "none"


def test_nothing_fits_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "qwen3-vl-32b", "--devices", "h100-80g"]) == 1
    assert "no layout fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "qwen3-vl-32"], "--model: unknown 'qwen3-vl-32'; did you mean 'qwen3-vl-32b'?"),
        (["--model", "qwen3-vl-8b", "--image-tokens", "2000"], "--image-tokens is 2000; use 0 to --prompt-tokens"),
    ],
)
def test_bad_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words, "--devices", "8xh100-80g"]) == 2
    assert message in capsys.readouterr().err


def test_plan_needs_no_torch() -> None:
    code = (
        "import sys\nfrom megatron_vlrl.cli import main\n"
        "code = main(['plan', '--model', 'qwen3-vl-4b', '--devices', '2xh100-80g'])\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def page_parts(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What docs/plan.md shows of a run, and of the sizes."""
    assert main(["plan", "--model", "qwen3-vl-8b", "--devices", "8xh100-80g"]) == 0
    columns = ("embedding", "layers", "head", "vision", "mergers")
    rows = []
    for name, counts in ((name, parameter_counts(spec)) for name, spec in SIZES.items()):
        numbers = [sum(counts.values()), *(counts[column] for column in columns)]
        rows.append(f"| `{name}` | " + " | ".join(f"{number / 1e6:,.1f}" for number in numbers) + " |")
    return {"output": code_block(capsys.readouterr().out), "sizes": "\n".join(rows)}


def test_page_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/plan.md").read_text()
    assert replace_parts(page, page_parts(capsys)) == page
