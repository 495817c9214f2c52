"""The settings of papers in examples/: they fit the program, the papers and each other, and run when small."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_vlrl.algorithms import check_options
from megatron_vlrl.algorithms.losses import check_loss_options
from megatron_vlrl.algorithms.scheduled import Scheduled
from megatron_vlrl.checkpoint.state import STATE_FILE
from megatron_vlrl.cli import main
from megatron_vlrl.cli.settings import read_settings
from megatron_vlrl.config.checks import value_of
from megatron_vlrl.config.schema import Config
from megatron_vlrl.errors import ConfigError, DataError
from megatron_vlrl.rollout.engines import ENGINES
from megatron_vlrl.tasks import resolve
from tests.run_folder import (
    REPOSITORY,
    TASKS,
    Inputs,
    inputs,  # noqa: F401 - a fixture
    prepare,
    records,
    run,
    train,
)

EXAMPLES = REPOSITORY / "examples"
PAPERS = ("openvlthinker_v2", "onethinker_ema_grpo", "othink_mr1")
DOMAINS = {f"domains:{name}" for name in ("general_vqa", "math", "chart", "ocr", "grounding", "spatial")}


@pytest.fixture(autouse=True)
def on_python_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the READMEs ask for: PYTHONPATH=examples. Started ranks inherit it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def commands(paper: str) -> list[list[str]]:
    """The words of every command of a README, its settings unquoted."""
    blocks = re.findall(r"```bash\n(.*?)```", (EXAMPLES / paper / "README.md").read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def variants(paper: str) -> dict[str, list[str]]:
    """The settings that a README lays over train.yaml, by the last part of their run.folder; "" for none."""
    start = ["megatron-vlrl", "train", "--config", f"examples/{paper}/train.yaml"]
    overrides = [words[4:] for words in commands(paper) if words[:4] == start]
    return {next(iter(words), "").removeprefix(f"run.folder=runs/{paper}/"): words for words in overrides}


VARIANTS = [(paper, name) for paper in PAPERS for name in variants(paper)]


def settings(paper: str, *overrides: str, file: str = "train.yaml") -> Config:
    return read_settings(EXAMPLES / paper / file, overrides, ("model.path", "data.train"))


def questions(paper: str) -> list[dict[str, Any]]:
    """The lines of a README's JSONL."""
    blocks = re.findall(r"```json\n(.*?)```", (EXAMPLES / paper / "README.md").read_text(), re.DOTALL)
    return [json.loads(line) for block in blocks for line in block.splitlines()]


# ------------------------------------------------------------------ settings


def test_the_variants_are_the_papers() -> None:
    assert list(variants("openvlthinker_v2")) == ["", "g2rpo", "entropy", "length"]
    assert list(variants("onethinker_ema_grpo")) == ["", "grpo", "dr_grpo"]
    assert list(variants("othink_mr1")) == ["", "counting", "geometry-grpo", "counting-grpo"]


@pytest.mark.parametrize(("paper", "name"), [*VARIANTS, *((paper, "small") for paper in PAPERS)])
def test_they_pass_every_check_and_each_has_its_own_folder(paper: str, name: str) -> None:
    config = settings(paper, file="small.yaml") if name == "small" else settings(paper, *variants(paper)[name])
    Scheduled(config)
    algorithm = config.algorithm
    check_options(algorithm.advantage.kind, algorithm.advantage.options)
    check_loss_options(algorithm.loss.kind, algorithm.loss.options)
    assert config.rollout.engine in ENGINES
    scheduled = [key.removeprefix("algorithm.kl.by_task.") for key in config.schedules]
    for task in [*config.reward.length_bands, *algorithm.entropy.bands, *config.data.weights, *scheduled]:
        resolve(task)
    folders = [settings(paper, *words).run.folder for words in variants(paper).values()]
    folders.append(settings(paper, file="small.yaml").run.folder)
    assert len(set(folders)) == len(folders)


def test_table_4_turns_the_two_shapings_on_one_by_one() -> None:
    configs = {name: settings("openvlthinker_v2", *words) for name, words in variants("openvlthinker_v2").items()}
    shaped = {name: (c.algorithm.entropy.coefficient, c.reward.length_weight) for name, c in configs.items()}
    assert shaped == {"": (0.02, 0.1), "g2rpo": (0.0, 0.0), "entropy": (0.02, 0.0), "length": (0.0, 0.1)}
    assert {c.algorithm.advantage.kind for c in configs.values()} == {"g2rpo"}
    full = configs[""]
    assert set(full.reward.length_bands) == set(full.algorithm.entropy.bands) == DOMAINS


def test_what_the_papers_say_is_what_the_files_say() -> None:
    v2, one, mr1 = (settings(paper) for paper in PAPERS)
    for config in (v2, one):
        assert (config.data.prompts_per_step, config.optimizer.lr) == (128, 2e-6)
        assert (config.rollout.samples_per_prompt, config.rollout.max_new_tokens) == (8, 4096)
        assert config.algorithm.filter.rule != "off"
    assert v2.algorithm.kl.reference == "none"
    assert one.algorithm.advantage.options["decay"] == 0.99
    assert (one.algorithm.kl.coefficient, one.algorithm.kl.reference) == (0.01, "frozen")
    # Equation 3 of OThink-MR1 at the start, at the turn and at the last step.
    steps = Scheduled(mr1)
    weights = [steps.at(step).algorithm.kl.by_task for step in (0, 300, 999)]
    assert [w["count"] for w in weights] == pytest.approx([0.07, 0.04, 0.1], abs=1e-4)
    assert [w["problem_types:math"] for w in weights] == pytest.approx([0.01, 0.0, 0.02], abs=1e-4)


@pytest.mark.parametrize("paper", PAPERS)
def test_the_small_variant_has_the_same_method(paper: str) -> None:
    def method(config: Config) -> dict[str, Any]:
        sections = dataclasses.asdict(config)
        reward, algorithm, optimizer = (sections[name] for name in ("reward", "algorithm", "optimizer"))
        reward["length_bands"] = algorithm["entropy"]["bands"] = None  # by task
        algorithm["advantage"]["task_key"] = None  # digits have no problem type
        optimizer["lr"] = optimizer["distributed"] = None  # the model's size
        schedules = sorted(str(schedule) for schedule in sections["schedules"].values())
        rollout = (config.rollout.samples_per_prompt, config.rollout.temperature, config.rollout.engine)
        return {**reward, **algorithm, **optimizer, "rollout": rollout, "minibatches": config.train.minibatches} | {
            "schedules": schedules
        }

    small = settings(paper, file="small.yaml")
    assert method(small) == method(settings(paper))
    assert set(small.reward.length_bands) | set(small.algorithm.entropy.bands) <= set(TASKS)
    warm = read_settings(EXAMPLES / "quickstart/warmstart.yaml", [], ())
    assert (small.model.path, small.data.train) == (f"{warm.run.folder}/hf", warm.data.train)


@pytest.mark.slow
@pytest.mark.parametrize("paper", PAPERS)
def test_the_layout_fits_the_devices_that_the_readme_names(paper: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(paper)
    words = next(words for words in commands(paper) if words[1] == "plan")
    assert main([*words[1:], "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    layouts = [one["settings"] for one in plan["layouts"] if one["total_bytes"] <= plan["limit_bytes"]]
    assert {key: value_of(config, key) for key in layouts[0]} in layouts
    for option, value in {
        "--prompts-per-step": config.data.prompts_per_step,
        "--prompt-tokens": config.data.max_prompt_tokens,
        "--response-tokens": config.rollout.max_new_tokens,
        "--group": config.rollout.samples_per_prompt,
        "--microbatch-tokens": config.train.microbatch_tokens,
    }.items():
        assert int(words[words.index(option) + 1]) == value, option
    assert ("--reference" in words) == (config.algorithm.kl.reference == "frozen")
    longest = config.data.max_prompt_tokens + config.rollout.samples_per_prompt * config.rollout.max_new_tokens
    assert longest <= config.train.microbatch_tokens


# ------------------------------------------------------------------ verifiers


@pytest.mark.parametrize(
    ("kind", "gold", "answers"),
    [
        (
            "multiple choice",
            "B",
            {"B": 1, "(B)": 1, " B. ": 1, "B: dogs": 1, "B) dogs": 1, "b": 0, "A B C D": 0, "AB": 0, "": 0},
        ),
        (
            "numerical",
            1234.5,
            {"1234.5": 1, "1,234.50": 1, "1234.504": 1, "1234.5 cm": 1, "1234.51": 0, "9" * 40: 0, "nan": 0},
        ),
        ("numerical", "40%", {"40": 1, "40%": 1, "0.4": 0, "40 or 41": 0, "²": 0}),
        # |a - 100| / 100 under 0.05, 0.10, ..., 0.50
        ("regression", 100, {"100": 1, "95.1": 1, "95": 0.9, "120": 0.6, "149": 0.1, "150": 0, "far": 0}),
        ("regression", 0.0, {"0": 1, "0.1": 0}),
        ("math", r"$\frac{1}{2}$", {r"\frac{1}{2}": 1, r"\frac{1}{ 2 }": 1, "1/2": 0, "0.5": 0}),
        ("math", "70°", {"70": 1, r"$70^\circ$": 1, "70.0": 1, "7": 0, "": 0}),
        (
            "OCR",
            "no parking on Sundays",
            {"no parking on Sundays": 1, "no parking Sundays": 0.75, "NO": 0, "x " * 9: 0},
        ),
        ("spatial grounding", [0, 0, 2, 2], {'{"boxes": [0, 0, 2, 2]}': 1, '{"boxes": [1, 0, 3, 2]}': 1 / 3}),
        (
            "spatial grounding",
            [0, 0, 2, 2],
            dict.fromkeys(["[0, 0, 2, 2]", '[["boxes", [0, 0, 2, 2]]]', '{"boxes": 1}', "{}", "[1]", "1", "x"], 0),
        ),
        (
            "spatial grounding",
            [0, 0, 2, 2],
            {'{"boxes": [0, 0, 9, 9], "boxes": [0, 0, 2, 2]}': 0, '{"boxes": [NaN]}': 0},
        ),
    ],
)
def test_answers_are_judged_by_their_problem_type(kind: str, gold: Any, answers: dict[str, float]) -> None:
    judged = {answer: resolve("domains:math").accuracy(answer, gold, {"problem_type": kind}) for answer in answers}
    assert judged == pytest.approx(answers)


@pytest.mark.parametrize(
    ("kind", "gold"),
    [
        ("multiple choice", "BC"),
        ("numerical", "many"),
        ("regression", True),
        ("OCR", " "),
        ("spatial grounding", [2, 0]),
    ],
)
def test_a_gold_that_nothing_could_equal_is_refused(kind: str, gold: Any) -> None:
    with pytest.raises(DataError, match="gold answer"):
        resolve("domains:chart").accuracy("B", gold, {"problem_type": kind})


def test_an_unknown_problem_type_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'numerical'"):
        resolve("domains:chart").accuracy("1", 1, {"problem_type": "numeric"})


@pytest.mark.slow
@pytest.mark.parametrize("paper", PAPERS)
def test_the_readmes_questions_are_prepared_and_can_be_answered(paper: str, tmp_path: Path) -> None:
    lines = questions(paper)
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    prepare(tmp_path / "questions.jsonl", tmp_path, tmp_path / "shards")
    for line in lines:
        gold = line["answer"]
        answer = json.dumps({"boxes": gold}) if isinstance(gold, list) else str(gold)
        assert resolve(line["task"]).accuracy(answer, gold, line.get("meta", {})) == 1.0
    if paper == "openvlthinker_v2":
        assert {line["task"] for line in lines} == DOMAINS
        assert all(settings(paper).algorithm.advantage.task_key in line["meta"] for line in lines)


# ------------------------------------------------------------------ small runs


@pytest.fixture(scope="module")
def warm(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A tiny model that answers some questions, as the quickstart's own warm start makes one."""
    root = tmp_path_factory.mktemp("warm")
    words = [f"run.folder={root}/run", f"model.path={inputs.model}", f"data.train={inputs.train}"]
    words += [f"evaluate.data={inputs.train}", "evaluate.per_task=8", "evaluate.temperature=0", "evaluate.every=10"]
    words += ["evaluate.start=20", "evaluate.stop_at=0.3", "train.steps=300", "parallel.tensor=1"]
    words += ["optimizer.lr=4e-3", "optimizer.warmup_steps=5", "rollout.max_new_tokens=48", "data.prompts_per_step=10"]
    run(train(EXAMPLES / "quickstart/warmstart.yaml", *words), 1, root / "out").ok()
    return root / "run/hf"


def small(paper: str, warm: Path, inputs: Inputs, folder: Path, *overrides: str) -> list[dict[str, Any]]:  # noqa: F811
    """The metrics of a small variant with few prompts and answers."""
    words = [f"run.folder={folder}", f"model.path={warm}", f"data.train={inputs.train}", "evaluate.data="]
    words += ["rollout.max_new_tokens=48", "rollout.samples_per_prompt=4", "data.prompts_per_step=8"]
    run(train(EXAMPLES / paper / "small.yaml", *words, *overrides), 1, folder / "out").ok()
    return records(folder)


def by_task(step: dict[str, Any], family: str) -> dict[str, float]:
    """A step's `family/task`, by task."""
    return {name.partition("/")[2]: value for name, value in step.items() if name.startswith(f"{family}/")}


@pytest.mark.slow
def test_openvlthinker_v2_drops_groups_and_shapes_lengths_and_entropies(warm, inputs, tmp_path):  # noqa: F811
    waiting = 0
    for step in small("openvlthinker_v2", warm, inputs, tmp_path, "train.steps=2"):
        groups = by_task(step, "filter")
        assert groups["drawn"] == groups["kept"] + groups["right"] + groups["wrong"] + groups["neither"]
        assert (groups["carried"], groups["short"]) == (waiting, 0)
        assert groups["wrong"] > 0
        waiting += groups["kept"] - 8
        assert sum(by_task(step, "effective_n").values()) == 8 * 4  # of the groups that are left, all teach something
        sides = by_task(step, "entropy_side")
        assert set(sides) == set(by_task(step, "effective_n"))
        assert set(sides.values()) <= {-1.0, 0.0, 1.0}
        assert any(sides.values())
        assert set(by_task(step, "length")) == set(TASKS)
        assert not any(name.startswith("reference_kl") for name in step)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["g2rpo", "entropy", "length"])
def test_the_ablations_of_table_4_run_small(name, warm, inputs, tmp_path):  # noqa: F811
    words = [word for word in variants("openvlthinker_v2")[name] if not word.startswith("run.")]
    (step,) = small("openvlthinker_v2", warm, inputs, tmp_path, "train.steps=1", *words)
    assert step["skipped"] is None
    assert bool(by_task(step, "entropy_side")) == (name == "entropy")
    assert bool(by_task(step, "length")) == (name == "length")


@pytest.mark.slow
def test_onethinker_scales_advantages_by_each_tasks_moving_average(warm, inputs, tmp_path):  # noqa: F811
    words = ["train.steps=2", "observe.rollouts_every=1", "observe.rollouts_kept=100"]
    first, second = small("onethinker_ema_grpo", warm, inputs, tmp_path, *words)
    assert first["updates"] > 1  # so that the step's later updates are away from the frozen weights
    assert second["reference_kl"] > first["reference_kl"] > 0
    assert min(by_task(first, "filter")["wrong"], by_task(second, "filter")["wrong"]) > 0
    (state,) = (tmp_path / "checkpoints").glob(f"*/{STATE_FILE}")
    kept = json.loads(state.read_text())["algorithm"]["advantage"]
    moments: dict[str, Any] = {}  # equations 9 to 11 of the paper, over what the rollouts' record says
    for step in (1, 2):
        groups = [group for group in records(tmp_path, "rollouts.jsonl") if group["step"] == step]
        rewards = [(group["task"], np.array([one["total"] for one in group["rollouts"]])) for group in groups]
        for task in {task for task, _ in rewards}:
            now = np.concatenate([totals for name, totals in rewards if name == task])
            now = np.array([now.mean(), (now**2).mean()])
            moments[task] = 0.99 * moments[task] + 0.01 * now if task in moments else now
        for (task, totals), group in zip(rewards, groups, strict=True):
            wanted = (totals - totals.mean()) / np.sqrt(moments[task][1] - moments[task][0] ** 2)
            if np.abs(wanted).max() > 5:  # then the group's own spread
                wanted = (totals - totals.mean()) / totals.std()
            assert [one["advantage"] for one in group["rollouts"]] == pytest.approx(wanted, abs=1e-4)
    assert {task: [one["mean"], one["mean_square"]] for task, one in kept.items()} == {
        task: pytest.approx(values.tolist()) for task, values in moments.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
def test_the_ablations_of_table_9_run_small(name, warm, inputs, tmp_path):  # noqa: F811
    words = [word for word in variants("onethinker_ema_grpo")[name] if not word.startswith("run.")]
    (step,) = small("onethinker_ema_grpo", warm, inputs, tmp_path, "train.steps=1", *words)
    assert step["skipped"] is None
    assert step["reference_kl"] > 0


@pytest.mark.slow
def test_othink_mr1_has_the_weight_of_each_task_follow_equation_3(warm, inputs, tmp_path):  # noqa: F811
    steps = small("othink_mr1", warm, inputs, tmp_path, "train.steps=4")
    for task, least, greatest in (("count", 0.04, 0.1), ("sum", 0.0, 0.02)):
        middle = (least + greatest) / 2
        wanted = [middle, middle - (middle - least) * 0.25 / 0.3]
        wanted += [least + (greatest - least) * (share - 0.3) / 0.7 for share in (0.5, 0.75)]
        assert [step[f"schedule/algorithm.kl.by_task.{task}"] for step in steps] == pytest.approx(wanted)
        divergences = [step[f"reference_kl/{task}"] for step in steps]
        assert divergences[0] == 0 < min(divergences[1:])  # the first update is of the reference itself
    assert not any(by_task(step, "filter") for step in steps)


@pytest.mark.slow
@pytest.mark.parametrize("paper", PAPERS)
def test_train_yaml_itself_runs_on_the_readmes_questions(paper, warm, tmp_path):
    """Nothing but sizes is changed, and filtering is off: a tiny model has no right answer to these."""
    lines = questions(paper)
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    prepare(tmp_path / "questions.jsonl", tmp_path, tmp_path / "shards")
    words = [f"run.folder={tmp_path}/run", f"model.path={warm}", f"data.train={tmp_path}/shards", "model.dtype=float32"]
    words += ["parallel.tensor=1", "parallel.data=1", "data.prompts_per_step=6", "rollout.max_new_tokens=48"]
    words += ["rollout.samples_per_prompt=4", "train.steps=1", "algorithm.filter.rule=off"]
    run(train(EXAMPLES / paper / "train.yaml", *words), 1, tmp_path / "out").ok()
    (step,) = records(tmp_path / "run")
    assert step["skipped"] is None
    tasks = {line["task"] for line in lines}
    assert by_task(step, "failed") == dict.fromkeys(tasks, 0.0)
    assert set(by_task(step, "entropy_side")) == (tasks if paper == "openvlthinker_v2" else set())
    assert set(by_task(step, "reference_kl")) == (tasks if paper != "openvlthinker_v2" else set())
