"""YAML and overrides to a Config: types, closed keys, and the way back."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlrl.config.load import dump, keys, load
from megatron_vlrl.config.schema import Config
from megatron_vlrl.config.yaml_format import read_yaml, write_yaml
from megatron_vlrl.errors import ConfigError

GOLDEN_KEYS = Path(__file__).parent / "golden" / "config_keys.txt"


def _file(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_set_of_keys_is_frozen():
    """A key is a promise to every user's file: adding or removing one is a deliberate change of the golden list."""
    assert list(keys()) == GOLDEN_KEYS.read_text().split()


def test_nothing_given_is_the_default():
    assert load(None) == Config()


def test_a_file_and_overrides_are_laid_over_each_other_in_order(tmp_path):
    path = _file(tmp_path, "train: {steps: 7}\ndata:\n  weights: {count: 1}\nrollout:\n  # all commented out\n")
    config = load(path, ["data.weights.read=2", "train.steps=8", "train.steps=9"])
    assert config.train.steps == 9
    assert config.data.weights == {"count": 1.0, "read": 2.0}


def test_a_whole_mapping_replaces_and_an_entry_adds(tmp_path):
    path = _file(tmp_path, "data: {weights: {count: 1}}")
    assert load(path, ["data.weights={read: 2}"]).data.weights == {"read": 2.0}


def test_a_glob_with_dots_is_one_entry():
    assert load(None, ["optimizer.lr_scale.model.visual.*=0.1"]).optimizer.lr_scale == {"model.visual.*": 0.1}


def test_a_section_can_be_overridden_at_once():
    rollout = load(None, ["rollout={engine: my.module:make, temperature: 2}"]).rollout
    assert (rollout.engine, rollout.temperature) == ("my.module:make", 2.0)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", ".0001", "0.0001", "+1e-4"])
def test_every_spelling_of_a_float_is_one(tmp_path, text):
    assert load(None, [f"optimizer.lr={text}"]).optimizer.lr == 1e-4
    assert load(_file(tmp_path, f"optimizer:\n  lr: {text}\n")).optimizer.lr == 1e-4


@pytest.mark.parametrize("text", ["no", "007", "1e5", "2026-01-01", "a: b", "null", ""])
def test_a_word_on_the_command_line_stays_a_word(text):
    assert load(None, [f"run.name={text}"]).run.name == text


def test_types_are_those_of_the_schema():
    config = load(
        None,
        [
            "optimizer.betas=[0, 1]",
            "model.freeze=['model.visual.*']",
            "reward.length_bands.count=[1, 2, 3, 4]",
            "algorithm.advantage.options={scope: task, tie_tol: 1e-9}",
        ],
    )
    assert config.optimizer.betas == (0.0, 1.0)
    assert all(isinstance(beta, float) for beta in config.optimizer.betas)
    assert config.model.freeze == ("model.visual.*",)
    assert config.reward.length_bands == {"count": (1.0, 2.0, 3.0, 4.0)}
    assert config.algorithm.advantage.options == {"scope": "task", "tie_tol": 1e-9}


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.steps=many", ["train.steps", "expected int", "'many'", "command line"]),
        ("train.steps=true", ["expected int", "True"]),
        ("train.steps=1.0", ["expected int", "1.0"]),
        ("parallel.sequence=1", ["parallel.sequence", "expected bool"]),
        ("optimizer.lr=.nan", ["optimizer.lr", "finite"]),
        ("optimizer.lr=.inf", ["optimizer.lr", "finite"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas", "a list of 2", "[0.9]"]),
        ("model.dtype=fp8", ["model.dtype", "'float32', 'bfloat16'", "'fp8'"]),
        ("model.freeze=x", ["model.freeze", "a list of str"]),
        ("data.weights.count=much", ["data.weights", "'count'", "float", "'much'"]),
        ("rollout=3", ["rollout", "section"]),
        ("train.steps", ["section.key=value"]),
        ("train.steps=[", ["train.steps", "not valid YAML"]),
    ],
)
def test_a_wrong_type_says_key_expected_and_given(override, parts):
    with pytest.raises(ConfigError) as error:
        load(None, [override])
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("given_key", "nearest"),
    [
        ("train.step", "train.steps"),
        ("optimzer.lr", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("data.promts_per_step", "data.prompts_per_step"),
        ("train.temperature", "rollout.temperature"),
        ("data.weight.count", "data.weights"),
        ("algorithm.advantage.option", "algorithm.advantage.options"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path, given_key, nearest):
    with pytest.raises(ConfigError, match=rf"command line: unknown key {given_key}; did you mean {nearest} "):
        load(None, [f"{given_key}=1"])
    text = "".join("  " * i + f"{name}:\n" for i, name in enumerate(given_key.split(".")))
    path = _file(tmp_path, text.rstrip("\n") + " 1\n")
    with pytest.raises(ConfigError, match=rf"run\.yaml: unknown key .*did you mean {nearest}"):
        load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  steps: 1\n  steps: 2\n", "'steps' is given twice"),
        ("train.steps: 1", "nested"),
        ("- 1", "a mapping of keys was expected"),
        ("train: [", "not valid YAML"),
        ("[a]: 1", "cannot be a key"),
        ("run: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_a_malformed_file_is_an_error(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(_file(tmp_path, text))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load(tmp_path / "absent.yaml")


def test_a_dumped_config_loads_back_equal(tmp_path):
    config = load(
        None,
        [
            "run.name=no",
            "run.resume=1e-4",
            "optimizer.lr=1e-7",
            "optimizer.lr_scale.model.*=1",
            "model.freeze=['*', '1']",
            "reward.length_bands.count=[1, 2, 3, 4]",
            "algorithm.advantage.options={deep: {list: [1, two, 3.5, true, null]}}",
        ],
    )
    assert load(_file(tmp_path, dump(config))) == config
    assert load(_file(tmp_path, dump(Config()))) == Config()


def test_a_dump_has_every_key():
    tree = read_yaml(dump(Config()))
    assert set(tree) == {field.name for field in dataclasses.fields(Config)}
    for key in keys():
        node = tree
        for name in key.split("."):
            node = node[name]


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
_LOOKALIKES = st.from_regex(r"[-+.0-9eE:_xo]{0,8}|yes|no|on|off|null|~|true|inf|=|<<", fullmatch=True)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=6), _SCALARS | _LOOKALIKES | st.lists(_SCALARS | _LOOKALIKES, max_size=3)
    )
)
def test_yaml_gives_back_what_was_written(value):
    assert read_yaml(write_yaml(value)) == value


def test_config_imports_without_torch():
    code = "import sys, megatron_vlrl.config.checks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
