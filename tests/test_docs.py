"""What the documents say can be done: links lead somewhere, commands exist, examples run, generated parts are new."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vlrl.cli import _parser
from megatron_vlrl.config.checks import check
from megatron_vlrl.config.load import keys, load
from megatron_vlrl.errors import ConfigError
from tools.config_docs import PAGE, comments, parts
from tools.pages import replace_parts

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
SCRIPTS = sorted((ROOT / "examples").rglob("*.sh"))
RECIPE = ROOT / "examples/quickstart/rl.yaml"  # what run.sh lays its arguments over
# What a script's variables hold, as far as it matters to a parser.
VARIABLES = {"$vlrl": "megatron-vlrl", "$python": "python", '"$seed"': "0", "$seed": "0", '"$@"': ""}
FILE = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)
MADE = {name for page in PAGES for name, _ in FILE.findall(page.read_text())}  # by the documents' own examples


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def bash_blocks(text: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", text, re.DOTALL)


def commands(script: str) -> Iterator[list[str]]:
    """The words of each simple command, without assignments before it."""
    for variable, value in VARIABLES.items():
        script = script.replace(variable, value)
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split, words.commenters = True, "#"
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set(";&|()"):
                yield from [command] if command else []
                command = []
            elif command or not (re.match(r"[A-Z]+=", word) or word in ("do", "then", "exec", "export")):
                command.append(word)


def dry_run(command: list[str]) -> None:
    """Parse what would be run; AssertionError or the program's own error where it could not be."""
    program, *words = command
    if program.endswith("megatron-vlrl"):
        arguments = _parser().parse_args(words)
        if arguments.command in ("train", "evaluate"):
            file = arguments.config and ROOT / arguments.config
            check(load(file if file and file.exists() else None, arguments.overrides))
    elif Path(program).name in ("bash", "python", "sh"):
        script, *rest = words
        if script in ("-n", "-c") or script in MADE or script.startswith("$"):
            return
        assert (ROOT / script).is_file(), script
        if script == "examples/quickstart/run.sh":
            check(load(RECIPE, rest))
        elif script.endswith(".py"):
            source = (ROOT / script).read_text()
            missing = [word for word in rest if word.startswith("--") and f'"{word}"' not in source]
            assert missing == [], f"{script} does not know {missing}"


def written_commands() -> list[tuple[str, list[str]]]:
    texts = [(page, block) for page in PAGES for block in bash_blocks(page.read_text())]
    texts += [(script, script.read_text()) for script in SCRIPTS]
    wanted = ("megatron-vlrl", "bash", "python", ".venv/bin/megatron-vlrl", ".venv/bin/python")
    return [(name(path), words) for path, text in texts for words in commands(text) if words[0] in wanted]


def test_commands_are_found():
    assert list(commands("A=1 b c=2 && d 'e f' # g\n  for x in 1; do\n h \\\n -i; done")) == [
        ["b", "c=2"],
        ["d", "e f"],
        ["for", "x", "in", "1"],
        ["h", "-i"],
        ["done"],
    ]
    found = [words for _, words in written_commands()]
    assert sum(words[0].endswith("megatron-vlrl") for words in found) >= 8
    assert sum(words[:2] == ["bash", "examples/quickstart/run.sh"] for words in found) >= 6


@pytest.mark.parametrize(("where", "words"), written_commands(), ids=lambda value: str(value)[:80])
def test_command_could_be_run(where, words):
    dry_run(words)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("megatron-vlrl trian --config examples/quickstart/rl.yaml", SystemExit),
        ("megatron-vlrl train --config examples/quickstart/rl.yaml data.weight=1", ConfigError),
        ("megatron-vlrl train --config examples/quickstart/rl.yaml parallel.data=3", ConfigError),
        ("bash examples/quickstart/run.sh algorithm.advantage.kindly=grpo", ConfigError),
        ("bash examples/quickstart/walk.sh", AssertionError),
        ("python tools/quickstart_seeds.py --run runs/seeds", AssertionError),
    ],
)
def test_a_command_that_could_not_be_run_is_found(words, error):
    with pytest.raises(error):
        dry_run(words.split())


def test_blocks_parse():
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            ast.parse(block)
        for block in bash_blocks(page.read_text()):
            result = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
            assert result.returncode == 0, f"{name(page)}: {result.stderr}"


def test_shaping_script_hands_over_settings_that_fit():
    text = (ROOT / "examples/quickstart/shaping.sh").read_text()
    [command] = [words for words in commands(text) if any(word.endswith("/run.sh") for word in words)]
    overrides = [word for word in command if re.match(r"[a-z_.]+=", word)]
    config = load(RECIPE, overrides)
    check(config)
    assert config.algorithm.entropy.coefficient > 0
    assert config.reward.length_weight > 0


def test_links_lead_somewhere():
    broken = [
        f"{name(page)} -> {target}"
        for page in PAGES
        for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#]+)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert broken == []


def test_index_names_every_page():
    linked = set(re.findall(r"\]\(([^)#]+)\)", (ROOT / "docs/index.md").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - linked == {"index.md"}


def test_settings_that_are_named_exist():
    sections = {key.partition(".")[0] for key in keys()}
    unknown = [
        f"{name(page)}: {key}"
        for page in PAGES
        for key in re.findall(r"`([a-z]+\.[a-z_.]+)(?:=[^`]*)?`", page.read_text())
        if key.partition(".")[0] in sections
        and key.rpartition(".")[2] not in ("py", "sh", "yaml", "json", "jsonl", "html")
        and not any(known == key or known.startswith(key + ".") or key.startswith(known + ".") for known in keys())
    ]
    assert unknown == []


def test_files_that_are_named_exist():
    """`folder/file.py` in running text: from the root, or from the package."""
    missing = [
        f"{name(page)}: {path}"
        for page in PAGES
        for path in re.findall(r"`((?:[\w-]+/)+[\w-]+\.(?:py|sh|yaml|txt|md))`", page.read_text())
        if not any((base / path).exists() for base in (ROOT, ROOT / "megatron_vlrl"))
    ]
    assert missing == []


def test_configuration_page_is_current():
    page = PAGE.read_text()
    assert replace_parts(page, parts()) == page, "run tools/config_docs.py --write"


def test_configuration_page_has_every_key_once():
    part = PAGE.read_text().partition("<!-- begin keys -->")[2].partition("<!-- end keys -->")[0]
    assert re.findall(r"^\| `([a-z_.]+)` \|", part, re.MULTILINE) == list(keys())


def test_comments_are_read_beside_and_above():
    source = "class A:\n    x: int = 1  # beside\n    # above\n    y: str = '#'\n\n    z: int = 2\n"
    assert comments(source) == {("A", "x"): "beside", ("A", "y"): "above", ("A", "z"): ""}


@pytest.fixture
def workplace(tmp_path):
    """A folder with the files of a page, and a shell that knows `python` and `megatron-vlrl`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for program, words in (("python", ""), ("megatron-vlrl", "-m megatron_vlrl")):
        (programs / program).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (programs / program).chmod(0o755)
    return tmp_path


def test_data_page_runs_as_it_stands(workplace):
    page = (ROOT / "docs/data.md").read_text()
    for file, text in FILE.findall(page):
        (workplace / file).write_text(text)
    [block] = re.findall(r"<!-- run -->\n```bash\n(.*?)```", page, re.DOTALL)
    [output] = re.findall(r"<!-- output -->\n```text\n(.*?)```", page, re.DOTALL)
    env = {**os.environ, "PATH": f"{workplace / 'bin'}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-e"], input=block, cwd=workplace, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == output
    assert sorted(path.name for path in (workplace / "shards").iterdir()) == [
        "index.npz",
        "manifest.json",
        "train-000000.tar",
    ]


def test_own_reward_of_the_data_page_judges(workplace, monkeypatch):
    for file, text in FILE.findall((ROOT / "docs/data.md").read_text()):
        (workplace / file).write_text(text)
    monkeypatch.syspath_prepend(str(workplace))
    from megatron_vlrl.tasks import resolve

    task = resolve("my_reward:colour")
    assert task.accuracy(" Red ", "red", {}) == 1.0
    assert task.accuracy("crimson", "red", {"also": ["crimson"]}) == 1.0
    assert task.accuracy("blue", "red", {}) == 0.0
