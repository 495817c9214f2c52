"""A whole run whose shards lie in a bucket, through a storm: the run of the folder, and no key in anything it wrote."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.fault_proxy import Rule
from tests.run_folder import (
    Ended,
    Inputs,
    Ranks,
    folder_bytes,
    inputs,  # noqa: F401 - fixtures
    records,
    train,
    write_config,
)
from tests.s3_server import (
    KEY,
    SECRET,
    faults,  # noqa: F401
    fresh_prefix,
    s3,  # noqa: F401
    s3_bucket,  # noqa: F401
)

pytestmark = [pytest.mark.data, pytest.mark.slow, pytest.mark.timeout(300)]


def run(argv: Sequence[str], size: int, logs: Path) -> Ended:
    """Ranks with the store's variables of this moment: the server they are forked from has those of its own start."""
    return Ranks(
        argv, size, logs, **{k: v for k, v in os.environ.items() if k.startswith("AWS_")}, NO_PROXY="*"
    ).ended()


def test_a_run_on_a_bucket_is_the_run_on_the_folder(inputs: Inputs, s3, faults, tmp_path: Path):  # noqa: F811
    faults.rules = [Rule("busy", share=0.15), Rule("cut", share=0.2, at=None)]
    prefix = fresh_prefix()
    far = [
        f"data.train={s3.upload(inputs.train, f'{prefix}/train')}",
        f"evaluate.data={s3.upload(inputs.heldout, f'{prefix}/heldout')}",
    ]
    configs = {name: write_config(tmp_path / name / "run.yaml", inputs) for name in ("near", "far")}
    near = run(train(configs["near"], "parallel.data=2"), 2, tmp_path / "near/out").ok()
    assert not faults.seen
    ended = run(train(configs["far"], "parallel.data=2", *far), 2, tmp_path / "far/out").ok()
    assert {"busy", "cut"} <= {seen.mode for seen in faults.seen}
    for name in ("metrics.jsonl", "evaluation.jsonl", "rollouts.jsonl"):
        assert records(tmp_path / "far/run", name) == records(tmp_path / "near/run", name), name
    assert folder_bytes(tmp_path / "far/run/hf") == folder_bytes(tmp_path / "near/run/hf")
    written = [near.err, ended.out, ended.err, *map(str, folder_bytes(tmp_path / "far").values())]
    assert not any(secret in text for text in written for secret in (KEY, SECRET))


def test_wrong_keys_end_a_run_with_the_reason(inputs: Inputs, s3, tmp_path: Path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    config = write_config(tmp_path / "run.yaml", inputs, data={"train": f"s3://{s3.name}/x"}, evaluate={"data": ""})
    ended = run(train(config), 1, tmp_path / "out")
    assert ended.codes == [2]
    assert "cannot read s3://shards/x: access denied" in ended.err
    assert "Traceback" not in ended.err
    assert not any("hunter2" in text for text in (ended.err, *map(str, folder_bytes(tmp_path).values())))
