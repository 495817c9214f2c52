"""The rules of the house hold, and their checks bite: every contract is broken on purpose in a copy of the tree."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_vlrl"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINT_IMPORTS = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"

# contract -> (file the line is added to, the line); more than one where a contract has several parts worth breaking
VIOLATIONS = [
    ("Imports point down", "config/schema.py", "import megatron_vlrl.packing"),
    ("Imports point down", "tasks/exact.py", "import megatron_vlrl.data"),
    ("Imports point down", "models/qwen3_vl/config.py", "import megatron_vlrl.parallel.dims"),
    ("Imports point down", "types.py", "import megatron_vlrl.errors"),
    ("Imports point down", "rollout/engine.py", "import megatron_vlrl.checkpoint"),
    ("Imports point down", "an_unlisted_module.py", ""),
    ("Everything before packing is torch-free", "types.py", "def later():\n    import torch"),
    ("Everything before packing is torch-free", "data/__init__.py", "import torch"),
    ("Everything before packing is torch-free", "algorithms/g2rpo.py", "import torch.nn.functional"),
    ("megatron-core is imported in backends.megatron and parallel alone", "packing/rows.py", "import megatron.core"),
    ("megatron-core is imported in backends.megatron and parallel alone", "backends/protocol.py", "import megatron"),
    ("vLLM is imported in rollout.engines alone", "rollout/engine.py", "import vllm"),
    ("neuronx-distributed is imported in backends.neuron alone", "train/__init__.py", "import neuronx_distributed"),
    ("Task families are islands", "tasks/exact.py", "import megatron_vlrl.tasks.box"),
    ("No package and its neighbour import each other", "parallel/dims.py", "import megatron_vlrl.parallel.groups"),
]


def python(*arguments: str, cwd: Path = ROOT, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def lint_imports(root: Path) -> tuple[int, set[str], str]:
    """Exit status, the names of the broken contracts, and all that was printed."""
    result = python("-c", LINT_IMPORTS, "--no-cache", cwd=root)
    output = result.stdout + result.stderr
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    return result.returncode, set(re.findall(r"^(.*?)\s+BROKEN", plain, re.MULTILINE)), output


@pytest.fixture
def tree(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "megatron_vlrl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_import_contracts_hold():
    status, broken, output = lint_imports(ROOT)
    assert status == 0, output
    assert not broken


@pytest.mark.parametrize(("contract", "file", "line"), VIOLATIONS)
def test_import_contract_bites(tree, contract, file, line):
    with (tree / "megatron_vlrl" / file).open("a") as source:
        source.write(f"\n{line}\n")
    status, broken, output = lint_imports(tree)
    assert status != 0
    assert contract in broken, output


def test_import_contracts_leave_each_package_its_place(tree):
    places = {
        "rollout/engines": "vllm",
        "backends/neuron": "torch_xla",
        "parallel": "megatron.core",
        "packing": "torch",
    }
    for folder, package in places.items():
        path = tree / "megatron_vlrl" / folder
        path.mkdir(exist_ok=True)
        (path / "__init__.py").touch()
        (path / "at_home.py").write_text(f"import {package}\n")
    status, _, output = lint_imports(tree)
    assert status == 0, output


def test_every_contract_is_broken_on_purpose():
    named = {contract["name"] for contract in SETTINGS["tool"]["importlinter"]["contracts"]}
    assert named == {contract for contract, _, _ in VIOLATIONS}


def test_what_is_before_packing_imports_neither_torch_nor_its_users():
    script = (
        "import sys, pkgutil, importlib\n"
        "for name in ('types', 'errors', 'config', 'data', 'tasks', 'algorithms'):\n"
        "    package = importlib.import_module('megatron_vlrl.' + name)\n"
        "    for info in pkgutil.walk_packages(getattr(package, '__path__', []), package.__name__ + '.'):\n"
        "        if info.name not in {f'megatron_vlrl.algorithms.{name}' for name in ('losses', 'importance', 'kl')}:\n"
        "            importlib.import_module(info.name)\n"
        "print(*sorted({'torch', 'transformers', 'megatron', 'webdataset'} & set(sys.modules)))\n"
    )
    result = python("-c", script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""


def code_words(source: str) -> set[str]:
    """Names and strings of the code; docstrings and comments may speak of anything."""
    tree = ast.parse(source)
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node, clean=False) is not None
    }
    words = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            words.add(node.id)
        elif isinstance(node, ast.Attribute):
            words.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            words.add(node.value)
    return words


def test_code_words_see_code_and_not_prose():
    assert code_words('"""cuda"""\n# cuda\nx = torch.device("cpu")') == {"x", "torch", "device", "cpu"}
    assert "cuda:0" in code_words('torch.device("cuda:0")')
    assert "cuda" in code_words("torch.cuda")


def test_only_runtime_and_backends_say_cuda():
    elsewhere = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] not in ("runtime", "backends")
        and any("cuda" in word for word in code_words(path.read_text()))
    ]
    assert elsewhere == []


def ruff_rules(path: str, source: str) -> set[str]:
    """The rules that `source` would break if it stood at `path`."""
    result = python(
        "-m", "ruff", "check", "--no-cache", "--output-format=json", f"--stdin-filename={path}", stdin=source
    )
    return {problem["code"] for problem in json.loads(result.stdout)}


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("megatron_vlrl/models/x.py", "import torch\n\nHERE = torch.cuda.is_available()\n", "TID251"),
        ("megatron_vlrl/train/x.py", "import torch.distributed as dist\n\ndist.barrier()\n", "TID251"),
        ("megatron_vlrl/loop.py", 'print("step")\n', "T201"),
        ("megatron_vlrl/data/x.py", "try:\n    X = 1\nexcept Exception:\n    X = 2\n", "BLE001"),
        ("megatron_vlrl/data/x.py", "def f(a: int) -> int:\n    return a\n", "D103"),
        ("megatron_vlrl/data/x.py", "def _f(a):\n    return a\n", "ANN001"),
        ("megatron_vlrl/data/x.py", f"def _f({', '.join(f'{c}: int' for c in 'abcdefghi')}) -> None: ...\n", "PLR0913"),
    ],
)
def test_ruff_bites(path, source, rule):
    assert rule in ruff_rules(path, source)


def test_ruff_lets_parallel_use_collectives():
    assert "TID251" not in ruff_rules("megatron_vlrl/parallel/x.py", "import torch.distributed as dist\n")


BROAD_EXCEPTS = {
    "tasks/reward.py": "a user's reward: its failure is a value of that rollout",
    "rollout/distribute.py": "an engine's failure on one rank is raised again on all of them",
    "cli/__init__.py": "the end of the program: a message and an exit status",
}


def test_broad_excepts_stand_at_the_borders_and_nowhere_else():
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"except (Exception|BaseException)\b", path.read_text())
    }
    assert found <= set(BROAD_EXCEPTS)
