"""Say what is installed, what works on this machine, and what is missing for the rest."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--json", action="store_true", help="for programs")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 0 if training on CPU works here, else 1."""
    from megatron_vlrl.runtime.doctor import diagnose

    findings = diagnose()
    print(json.dumps(findings.as_json(), indent=2) if arguments.json else findings.as_text())
    return 0 if findings.cpu_path_works else 1
