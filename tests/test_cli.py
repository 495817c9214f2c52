"""The command line: what each command calls, how errors end, and that ranks started here are one job."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from PIL import Image

from megatron_vlrl.cli import COMMANDS, main

RUN = [sys.executable, "-m", "megatron_vlrl"]
UNREAD = 128 + signal.SIGPIPE
SETTINGS = ["model.path=m", "data.train=d"]

# The training loop is not these tests' concern: each writes its own, put in its place in every process started.
STAND_IN = """
import os, sys, types
loop = types.ModuleType("megatron_vlrl.loop")
exec({body!r}, vars(loop))
sys.modules["megatron_vlrl.loop"] = loop
"""


@pytest.fixture
def command(tmp_path):
    """Start a command whose `megatron_vlrl.loop` has the given text; settings go to a run folder of the test's own."""

    def start(argv, body, **options):
        (tmp_path / "sitecustomize.py").write_text(STAND_IN.format(body=body))
        (tmp_path / "run.yaml").write_text(f"run: {{folder: {tmp_path / 'run'}}}\n")
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path}
        return subprocess.Popen([*RUN, *argv], env=env, text=True, **options)

    return start


@pytest.fixture
def finished(command, tmp_path):
    """Run such a command to its end: (exit code, stdout, stderr)."""

    def run(argv, body):
        process = command(argv, body, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    return run


def _train(tmp_path: Path, *overrides: str) -> list[str]:
    return ["train", "--config", str(tmp_path / "run.yaml"), *SETTINGS, *overrides]


def test_help_needs_no_torch():
    code = """
import sys
from megatron_vlrl.cli import main
try:
    main(["train", "--help"])
except SystemExit as end:
    sys.exit(end.code or "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--config" in done.stdout


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def test_train_gives_the_loop_its_settings_and_prints_what_it_returns(finished, tmp_path):
    code, out, _ = finished(
        _train(tmp_path, "train.steps=3"), "def train(config): return f'{config.train.steps} steps'"
    )
    assert (code, out) == (0, "3 steps\n")


def test_evaluate_needs_a_model_and_data(capsys):
    assert main(["evaluate", "--model", "m"]) == 2
    assert "evaluate.data" in capsys.readouterr().err


def test_convert_wants_a_checkpoint_in_its_run(capsys, tmp_path):
    assert main(["convert", "--from", str(tmp_path / "checkpoints" / "step-1"), "--to-hf", str(tmp_path / "hf")]) == 2
    assert f"{tmp_path / 'config.yaml'} does not exist" in capsys.readouterr().err


def test_a_bad_setting_is_one_message(capsys, tmp_path):
    assert main(["train", "--config", str(tmp_path / "absent.yaml")]) == 2
    (tmp_path / "run.yaml").write_text("train: {step: 1}")
    assert main(_train(tmp_path)) == 2
    err = capsys.readouterr().err
    assert "did you mean train.steps" in err
    assert "Traceback" not in err


def test_a_setting_that_the_command_needs_is_asked_for(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("")
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "model.path=m"]) == 2
    assert "data.train is empty" in capsys.readouterr().err


def test_an_error_of_ours_has_no_traceback_and_any_other_has(finished, tmp_path):
    body = "from megatron_vlrl.errors import DataError\ndef train(config): raise DataError('no shards; make some')"
    code, _, err = finished(_train(tmp_path), body)
    assert (code, err) == (2, "error: no shards; make some\n")
    code, _, err = finished(_train(tmp_path), "def train(config): return 1 / 0")
    assert code == 1
    assert "Traceback" in err
    assert "ZeroDivisionError" in err


@pytest.mark.slow
def test_two_ranks_are_one_job(finished, tmp_path):
    body = """
import os
def train(config):
    print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"])
    return "the end"
"""
    code, out, err = finished(_train(tmp_path, "parallel.tensor=2", "run.threads=2"), body)
    assert (code, out, err) == (0, "rank 0 of 2 2\nthe end\n", "")
    assert "rank 1 of 2 2" in (tmp_path / "run/logs/rank-1.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "exit_code", "message"),
    [
        ("1 / 0", 1, "error: rank 1 failed: ZeroDivisionError: division by zero"),
        ("os.kill(os.getpid(), 9)", 1, "error: rank 1 was killed by SIGKILL"),
    ],
)
def test_one_dying_rank_ends_all_with_its_name(finished, tmp_path, failure, exit_code, message):
    body = f"""
import os, time
def train(config):
    if os.environ["RANK"] == "1":
        {failure}
    time.sleep(300)
"""
    code, _, err = finished(_train(tmp_path, "parallel.data=2"), body)
    assert code == exit_code
    assert message in err
    assert str(tmp_path / "run/logs/rank-1.log") in err


@pytest.mark.slow
def test_an_error_that_all_ranks_raise_is_told_once(finished, tmp_path):
    body = "from megatron_vlrl.errors import ModelError\ndef train(config): raise ModelError('no such folder')"
    code, out, err = finished(_train(tmp_path, "parallel.data=2"), body)
    assert (code, out) == (2, "")
    assert err.count("no such folder") == 1
    assert "Traceback" not in err


@pytest.mark.slow
def test_rank_0_has_the_terminal_and_ctrl_c_ends_all_quietly(command, tmp_path):
    body = f"""
import os, pathlib, sys, time
def train(config):
    pathlib.Path("{tmp_path}", "tty-" + os.environ["RANK"]).write_text(str(sys.stdout.isatty() and sys.stderr.isatty()))
    time.sleep(300)
"""
    ours, theirs = pty.openpty()
    process = command(
        _train(tmp_path, "parallel.data=2"),
        body,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    files = [tmp_path / f"tty-{rank}" for rank in range(2)]
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [file.read_text() for file in files] == ["True", "False"]
    os.write(ours, b"\x03")
    assert process.wait(30) == 128 + signal.SIGINT
    os.set_blocking(ours, False)
    assert os.read(ours, 4096).strip() == b"^C"
    os.close(ours)


PLAN = ["plan", "--model", "qwen3-vl-2b", "--devices", "h100-80g"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("argv", [PLAN, [*PLAN, "--json"], ["--help"], ["train", "--help"]], ids=" ".join)
def test_output_that_nobody_reads_ends_a_command_quietly(argv, unbuffered):
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen([*RUN, *argv], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # `| head` that has gone
    assert process.stderr.read() == b""
    # Of unbuffered help argparse itself says nothing.
    assert process.wait(60) == (0 if "--help" in argv and unbuffered else UNREAD)
    process.stderr.close()


ENDLESS = "def train(config):\n    for step in range(100_000): print('step', step)\n    raise SystemExit('not stopped')"


@pytest.mark.parametrize(
    "degrees", [[], pytest.param(["parallel.data=2"], marks=pytest.mark.slow)], ids=["one rank", "two ranks"]
)
def test_head_ends_a_run_quietly(command, tmp_path, degrees):
    process = command(_train(tmp_path, *degrees), ENDLESS, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "step 0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == UNREAD
    process.stderr.close()


def test_a_message_that_nobody_reads_ends_a_command_too():
    argv = ["plan", "--model", "m", "--devices", "h100-80g"]
    process = subprocess.Popen([*RUN, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.close()
    assert process.wait(60) == UNREAD


def test_another_broken_pipe_is_an_error_like_any_other(finished, tmp_path):
    code, _, err = finished(_train(tmp_path), "def train(config): raise BrokenPipeError('of a worker')")
    assert code == 1
    assert "BrokenPipeError: of a worker" in err


def test_closed_output_is_no_error():
    done = subprocess.run(["bash", "-c", 'exec "$@" >&-', "-", *RUN, *PLAN], check=False, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.fixture
def questions(tmp_path):
    """A JSONL of two questions and their image."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    rows = [{"key": f"k{i}", "task": "count", "prompt": "?", "images": ["a.png"], "answer": str(i)} for i in range(2)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({**row, "meta": {}}) + "\n" for row in rows))
    return path


def test_data_is_prepared_and_verified(questions, tmp_path, capsys):
    shards = tmp_path / "shards"
    argv = ["data", "prepare", "--jsonl", str(questions), "--images", str(tmp_path), "--out", str(shards)]
    assert main(argv) == 0
    assert "2 samples in 1 shards" in capsys.readouterr().out
    assert main(["data", "verify", str(shards)]) == 0
    tar = next(shards.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    assert main(["data", "verify", str(shards)]) == 2
    assert tar.name in capsys.readouterr().err


def test_a_gold_answer_that_cannot_be_judged_stops_prepare(questions, tmp_path, capsys):
    questions.write_text(questions.read_text().replace('"answer": "1"', '"answer": "many"'))
    argv = ["data", "prepare", "--jsonl", str(questions), "--images", str(tmp_path), "--out", str(tmp_path / "shards")]
    assert main(argv) == 2
    assert "2" in capsys.readouterr().err  # the line
    assert not (tmp_path / "shards").exists()
