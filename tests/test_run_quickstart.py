"""The quickstart's settings fit the program and each other; nothing is run."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_vlrl.algorithms import check_options
from megatron_vlrl.algorithms.losses import check_loss_options
from megatron_vlrl.cli.settings import read_settings
from megatron_vlrl.rollout.engines import ENGINES
from tests.run_folder import REPOSITORY, TASKS

FOLDER = REPOSITORY / "examples/quickstart"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
SCRIPTS = sorted(FOLDER.glob("*.sh"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_its_settings_pass_every_check(path: Path) -> None:
    config = read_settings(path, [], ("model.path", "data.train"))
    check_options(config.algorithm.advantage.kind, config.algorithm.advantage.options)
    check_loss_options(config.algorithm.loss.kind, config.algorithm.loss.options)
    assert config.rollout.engine in ENGINES
    for names in (config.data.weights, config.reward.length_bands, config.algorithm.entropy.bands):
        assert set(names) <= set(TASKS)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_its_scripts_are_bash_that_names_files_and_settings_that_exist(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    for name in re.findall(r"\b(?:examples|tools)/[\w/.]+\.(?:py|sh|yaml)\b", text):
        assert (REPOSITORY / name).is_file(), name


def test_reinforcement_learning_starts_where_the_warm_start_ends() -> None:
    warm = read_settings(FOLDER / "warmstart.yaml", [], ())
    rl = read_settings(FOLDER / "rl.yaml", [], ())
    assert Path(rl.model.path) == Path(warm.run.folder) / "hf"
    assert rl.data.train == warm.data.train
    assert rl.evaluate.data != rl.data.train


def test_the_shaping_variants_settings_pass_every_check() -> None:
    words = shlex.split((FOLDER / "shaping.sh").read_text(), comments=True)
    overrides = [word for word in words if re.match(r"[a-z_]+(\.[a-z_]+)+=", word)]
    config = read_settings(FOLDER / "rl.yaml", overrides, ())
    assert set(config.reward.length_bands) == set(config.algorithm.entropy.bands) == set(TASKS)
    assert config.run.folder != read_settings(FOLDER / "rl.yaml", [], ()).run.folder
