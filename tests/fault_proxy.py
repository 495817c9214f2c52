"""A proxy on loopback between a client and an HTTP server that breaks answers as its rules say, and keeps a log."""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from dataclasses import dataclass, field

BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass
class Rule:
    """What to do with some requests; the first rule that takes a request decides.

    mode: `busy` (503), `cut` (close after `at` bytes of the body), `stall` (then send nothing more), `slow` (at most
    `rate` bytes a second), `tag` (another ETag), `whole` (200 where
    206 was answered), `refuse` (close before an answer), `echo` (403 whose body repeats the
    request's headers). match: searched in the path. share: of the requests that it takes. times: that it acts.
    at: None is a random byte. until: time.monotonic() after which it is over.
    """

    mode: str
    match: str = ""
    share: float = 1.0
    times: float = float("inf")
    at: int | None = 0
    rate: float = 1e4
    until: float = float("inf")
    taken: int = 0

    def takes(self, path: str, chance: random.Random) -> bool:
        if self.taken >= self.times or time.monotonic() > self.until or not re.search(self.match, path):
            return False
        if chance.random() >= self.share:
            return False
        self.taken += 1
        return True


@dataclass
class Seen:
    """One request: its range as the header says, and the mode of the rule that took it."""

    method: str
    path: str
    range: str | None
    mode: str | None


@dataclass
class FaultProxy:
    """`with FaultProxy(port) as proxy:` listens on proxy.port; rules may be changed at any time."""

    upstream: int
    seed: int = 0
    rules: list[Rule] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    port: int = 0

    def __enter__(self) -> FaultProxy:
        self._chance = random.Random(self.seed)
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._client, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort() if writer.is_closing() else writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; whether the connection can carry another."""
        head = await reader.readuntil(b"\r\n\r\n")
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        body = await reader.readexactly(int(_header(head, "content-length") or 0))
        rule = next((rule for rule in list(self.rules) if rule.takes(path, self._chance)), None)
        self.seen.append(Seen(method, path, _header(head, "range"), rule.mode if rule else None))
        if rule and rule.mode == "refuse":
            writer.transport.abort()
            return False
        if rule and rule.mode in ("busy", "echo"):
            status, text = (b"503 Slow Down", BUSY) if rule.mode == "busy" else (b"403 Forbidden", _echo(head))
            await _send(writer, status, b"" if method == "HEAD" else text, len(text))
            return True
        return await self._forward(head, body, method, rule, writer)

    async def _forward(
        self, head: bytes, body: bytes, method: str, rule: Rule | None, writer: asyncio.StreamWriter
    ) -> bool:
        upstream, to = await asyncio.open_connection("127.0.0.1", self.upstream)
        try:
            to.write(re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head)[:-2] + b"Connection: close\r\n\r\n" + body)
            answer = await upstream.readuntil(b"\r\n\r\n")
            data = b"" if method == "HEAD" else await upstream.read()
        finally:
            to.close()
        if rule and rule.mode == "tag":
            answer = re.sub(rb'(?i)\r\netag: *"?[^\r"]*"?', b'\r\nEtag: "0123456789abcdef0123456789abcdef"', answer)
        if rule and rule.mode == "whole":
            answer = answer.replace(b"206 Partial Content", b"200 OK")
        writer.write(answer)
        if rule and rule.mode in ("cut", "stall", "slow"):
            await self._break(rule, data, writer)
            return False
        writer.write(data)
        await writer.drain()
        return False  # the answer said `Connection: close`

    async def _break(self, rule: Rule, data: bytes, writer: asyncio.StreamWriter) -> None:
        if rule.mode == "slow":
            for start in range(0, len(data), 512):
                writer.write(data[start : start + 512])
                await writer.drain()
                await asyncio.sleep(512 / rule.rate)
            return
        at = self._chance.randrange(len(data) or 1) if rule.at is None else rule.at
        writer.write(data[:at])
        await writer.drain()
        if rule.mode == "stall":
            await asyncio.sleep(3600)
        await asyncio.sleep(0.01)  # what was sent arrives before the reset
        writer.transport.abort()


def _header(head: bytes, name: str) -> str | None:
    found = re.search(rb"(?i)\r\n" + name.encode() + rb": *([^\r]+)", head)
    return found[1].decode() if found else None


def _echo(head: bytes) -> bytes:
    """What a store says of a wrong signature: it repeats what was signed, session token and all."""
    return b"<Error><Code>SignatureDoesNotMatch</Code><StringToSign>" + head + b"</StringToSign></Error>"


async def _send(writer: asyncio.StreamWriter, status: bytes, text: bytes, length: int) -> None:
    writer.write(
        b"HTTP/1.1 %s\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n" % (status, length) + text
    )
    await writer.drain()
