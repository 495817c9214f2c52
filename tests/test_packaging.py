"""What is installed is pinned, the scripts that install it refuse what they must, and no document points nowhere."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
PRINT_REQUIREMENTS = (
    "import runpy, setuptools\n"
    "setuptools.setup = lambda **k: print([k['install_requires'], *k['extras_require'].values()])\n"
    "runpy.run_path('setup.py')\n"
)


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **env}
    return subprocess.run(
        command, cwd=ROOT, env=environment, input="", capture_output=True, text=True, timeout=120, check=False
    )


def name(requirement: str) -> str:
    return re.split(r"[\[=<>!~ ]", requirement)[0].lower().replace("_", "-")


def test_constraints_pin_exactly_and_once():
    assert [line for line in CONSTRAINTS if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    names = [name(line) for line in CONSTRAINTS]
    assert len(names) == len(set(names))


def test_constraints_cover_every_extra():
    result = run(sys.executable, "-c", PRINT_REQUIREMENTS)
    assert result.returncode == 0, result.stderr
    wanted = {name(requirement) for group in ast.literal_eval(result.stdout) for requirement in group}
    assert wanted - {name(line) for line in CONSTRAINTS} == set()


@pytest.mark.parametrize("script", ["tools/setup_env.sh", "tools/lint.sh", "tests/run.sh", ".ci/run"])
def test_script_parses_and_is_executable(script):
    assert os.access(ROOT / script, os.X_OK)
    result = run("bash", "-n", ROOT / script)
    assert result.returncode == 0, result.stderr


def test_setup_env_refuses_a_folder_that_is_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    result = run("bash", "tools/setup_env.sh", tmp_path)
    assert result.returncode == 1
    assert "is no virtual environment" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_setup_env_names_the_python_it_needs(tmp_path):
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'Python 3.9.1'\nexit 1\n")
    old.chmod(0o755)
    result = run("bash", "tools/setup_env.sh", tmp_path / "venv", PYTHON=str(old))
    assert result.returncode == 1
    assert "is Python 3.9.1; Python 3.11 is needed" in result.stderr


def test_setup_env_refuses_an_unknown_option():
    result = run("bash", "tools/setup_env.sh", "--gpu")
    assert result.returncode == 2
    assert "unknown option --gpu" in result.stderr


def test_links_between_documents_lead_somewhere():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{document.relative_to(ROOT)} -> {target}"
        for document in documents
        for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#]+)", document.read_text())
        if not (document.parent / target).exists()
    ]
    assert broken == []
