"""argv -> Config -> one command."""

from __future__ import annotations

import argparse
import os
import select
import sys
import traceback
from collections.abc import Sequence

from megatron_vlrl.cli import convert, data, doctor, evaluate, plan, train
from megatron_vlrl.errors import VLRLError
from megatron_vlrl.runtime import failure
from megatron_vlrl.runtime.failure import EXIT_UNREAD

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

    0 done; 1 an unexpected error, with its traceback; 2 an error that the message says how to mend; 130 Ctrl-C;
    141 nobody reads the output any more (`| head`), said to nobody: a program killed by SIGPIPE ends so in a shell.
    """
    try:
        try:
            return _run(argv)
        finally:
            print(end="", flush=True)  # at the interpreter's end nothing could be done about an error
    except BrokenPipeError:
        for stream in _unread():  # what is still buffered is lost without a word
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        return EXIT_UNREAD


def _run(argv: Sequence[str] | None) -> int:
    """Errors become messages and exit codes, but for BrokenPipeError of the output itself."""
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
    except Exception as error:  # the program's outer border
        if isinstance(error, BrokenPipeError) and _unread():
            raise
        if not failure.record(error, expected=False):
            traceback.print_exc()
        return EXIT_UNEXPECTED
    return code


def _unread() -> list[int]:
    """Which of standard output and standard error are pipes without a reader."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    return [stream for stream, events in poll.poll(0) if events & (select.POLLERR | select.POLLHUP)]


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
