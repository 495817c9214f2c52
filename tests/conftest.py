"""What every test shares: one thread, no network, and an honest last word on what was not checked."""

from __future__ import annotations

import os
from collections import defaultdict

# Before torch or a tokenizer is imported anywhere: thread pools are sized once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


def _missing_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else f"no CUDA device (torch {torch.__version__})"


def _missing_neuron() -> str | None:
    try:
        import neuronx_distributed  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # the public index holds stubs that refuse to import
        return f"neuronx-distributed does not import here: {error}"
    return None


def _missing_vllm() -> str | None:
    from importlib.util import find_spec  # one that is there but does not import is to fail the tests

    return None if find_spec("vllm") else "vLLM is not installed: bash tools/setup_env.sh --dev"


NEEDS = {"gpu": _missing_gpu, "neuron": _missing_neuron, "vllm": _missing_vllm}


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--write-layouts`: put the errors of `-m layouts` into docs/layouts.md."""
    parser.addoption("--write-layouts", action="store_true", help="write the table of docs/layouts.md")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs hardware that is not here; hardware is looked for only when a test asks for it."""
    for marker, missing in NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (reason := missing()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=f"{marker}: {reason}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name every check that did not run, by reason, so that a green run is not mistaken for a complete one."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        by_reason[reason.removeprefix("Skipped: ")].append(report.nodeid)
    deselected = len(terminalreporter.stats.get("deselected", []))
    if not by_reason and not deselected:
        return
    terminalreporter.section("NOT CHECKED IN THIS RUN", sep="!", red=True, bold=True)
    for reason, names in sorted(by_reason.items()):
        terminalreporter.write_line(f"{len(names)} x {reason}", bold=True)
        for name in names:
            terminalreporter.write_line(f"    {name}")
    if deselected:
        terminalreporter.write_line(f"{deselected} x deselected on the command line", bold=True)
