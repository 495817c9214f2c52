"""argv -> Config -> one command."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from megatron_vlrl.cli import convert, data, doctor, evaluate, plan, train
from megatron_vlrl.errors import VLRLError
from megatron_vlrl.runtime import failure

# Each has add_arguments(parser) and run(arguments) -> exit code; its docstring's first line is its help.
COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "convert": convert,
    "plan": plan,
    "data": data,
    "doctor": doctor,
}

EXIT_UNEXPECTED, EXIT_EXPECTED, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code.

    0 done; 1 an unexpected error, with its traceback; 2 an error that the message says how to mend; 130 Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code: int = COMMANDS[arguments.command].run(arguments)
    except VLRLError as error:
        if not failure.record(error, expected=True):
            print(f"error: {error}", file=sys.stderr)
        return EXIT_EXPECTED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001  (the program's outer border)
        if not failure.record(error, expected=False):
            traceback.print_exc()
        return EXIT_UNEXPECTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-vlrl", description="Reinforcement learning with verifiable rewards for Qwen3-VL."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(name, help=text.splitlines()[0], description=text)
        module.add_arguments(command)
    return parser
