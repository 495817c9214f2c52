"""The doctor: verdicts follow from what works, and what works was tried."""

from __future__ import annotations

import json
import sys

import pytest

from megatron_vlrl.cli import main
from megatron_vlrl.rollout.engines import ENGINES
from megatron_vlrl.runtime import doctor
from megatron_vlrl.runtime.doctor import CUDA, FEATURES, PACKAGES, REAL_PROCESSOR, Findings, import_problem, judge


def _feature(name: str) -> doctor.Feature:
    return next(feature for feature in FEATURES if feature.name == name)


def test_what_is_needed_can_be_found():
    for feature in FEATURES:
        assert set(feature.needs) <= {*PACKAGES, CUDA, REAL_PROCESSOR}


def test_a_missing_package_is_named_with_its_extra():
    state = judge(_feature("megatron local, CPU"), {"torch", "transformers"})
    assert (state.works, state.missing) == (False, ("megatron-core",))
    assert "megatron-vlrl[cpu]" in state.fix


def test_a_missing_device_is_not_something_to_install():
    state = judge(_feature("megatron local, CUDA"), {"torch", "transformers", "megatron-core"})
    assert (state.works, state.fix) == (False, f"needs {CUDA}")


def test_what_this_version_has_not_does_not_work_even_with_every_package():
    state = judge(_feature("megatron te"), {*PACKAGES, CUDA})
    assert not state.works
    assert "not in this version" in state.fix


def test_the_cpu_path_is_what_decides():
    def findings(working):
        return Findings(machine={}, packages=(), features=tuple(judge(feature, working) for feature in FEATURES))

    assert findings({*doctor.PACKAGES}).cpu_path_works
    for need in ("torch", "megatron-core", "transformers", "webdataset"):
        assert not findings(set(PACKAGES) - {need}).cpu_path_works


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", None),
        ("raise ImportError('a stub')", "does not import: a stub"),
        ("raise OSError('libcuda.so.1: no such file')", "does not import: libcuda.so.1: no such file"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "does not import: operator torchvision"),
    ],
)
def test_an_installed_package_counts_only_if_it_imports(tmp_path, monkeypatch, text, problem):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "probed_package", raising=False)
    (tmp_path / "probed_package.py").write_text(text)
    found = import_problem("probed_package")
    assert found is None if problem is None else found is not None and found.startswith(problem)


def test_an_absent_package_and_another_project_of_its_name(tmp_path, monkeypatch):
    assert import_problem("no_such_package_here") == "not installed"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "probed_other.py").write_text("")
    assert str(import_problem("probed_other.optimizers")).startswith("does not import")


def test_an_engine_is_claimed_exactly_if_it_is_in_the_table():
    engines = {feature.name: feature.shipped for feature in FEATURES if feature.role == "rollout"}
    assert engines == {name: name in ENGINES for name in engines}


def test_the_command_says_the_same_in_both_forms(capsys):
    code = main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert code == (0 if findings["cpu_path_works"] else 1)
    states = {feature["name"]: feature["works"] for feature in findings["features"]}
    assert set(states) == {feature.name for feature in FEATURES}
    main(["doctor"])
    text = capsys.readouterr().out.split("Works here")[1]
    for name, works in states.items():
        line = next(line for line in text.splitlines() if f"  {name} " in line)
        assert line.split(name)[1].split()[0] == ("yes" if works else "no")
