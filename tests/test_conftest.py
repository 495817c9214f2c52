"""A run says which checks it left out: hardware that is not here, tests that skipped themselves, deselected ones."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

SUITE = """
import os
import pytest

@pytest.mark.neuron
def test_on_a_neuron_core(): raise AssertionError("ran without the hardware")

def test_that_skips_itself(): pytest.skip("no room for a small disk")

@pytest.mark.slow
def test_slow(): pass

def test_plain(): assert os.environ["OMP_NUM_THREADS"] == "1"
"""


@pytest.fixture
def summary(tmp_path):
    """What pytest prints for SUITE with `-m 'not slow'`."""
    shutil.copy(TESTS / "conftest.py", tmp_path)
    shutil.copy(TESTS.parent / "pyproject.toml", tmp_path)
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", "test_suite.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout
    return result.stdout.partition("NOT CHECKED IN THIS RUN")[2]


@pytest.mark.skipif(importlib.util.find_spec("neuronx_distributed") is not None, reason="this machine has NxD")
def test_summary_names_what_did_not_run_and_why(summary):
    assert "1 x neuron: neuronx-distributed does not import here" in summary
    assert "test_suite.py::test_on_a_neuron_core" in summary
    assert "1 x no room for a small disk\n    test_suite.py::test_that_skips_itself" in summary
    assert "1 x deselected on the command line" in summary
    assert "test_plain" not in summary
