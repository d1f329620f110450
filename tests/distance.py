"""The hub far away: what goes to its three parts, and what comes back, takes time on the way.

    with Hub() as hub, FarHub(hub, 0.1) as far, Mirror(registries=far.registries_file) as mirror:
        ...
        print(far.connections())

The kernel's netem would delay packets; it is a module that many kernels lack, and needs root. Here a proxy delays
bytes, which adds the same time to each round trip, but shows nothing of TCP's own windows.
"""

import asyncio
import socket
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from hub import REDIRECT_TO_CDN
from hub import TOKEN_AUTH
from hub import Hub
from hub import write_registries
from parts import Premises
from parts import RegistryRequest

REGISTRY_HOST = "127.0.0.21"
BLOCK = 256 << 10  # bytes that are passed on at once
UNDER_WAY = 64  # blocks that may be on the way at a time


class Distance:
    """Listen beside a server, and pass all bytes on, from and to it; `round_trip` is in seconds.

    A connection's handshake is a round trip too: its first byte waits for that. `connections` counts them. The server's
    certificate fits, as only the port is another one.
    """

    def __init__(self, server_url: str, round_trip: float) -> None:
        self._server = urlsplit(server_url)
        self._listener = socket.create_server((self._host, 0), backlog=1024)
        self._round_trip = round_trip
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), daemon=True)
        self._ending = asyncio.Event()
        self.url = f"https://{self._host}:{self._listener.getsockname()[1]}"
        self.connections = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join()
        self._loop.close()

    @property
    def _host(self) -> str:
        return self._server.hostname or ""

    async def _run(self) -> None:
        server = await asyncio.start_server(self._connected, sock=self._listener)
        await self._ending.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _connected(self, near: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self.connections += 1
        opened = self._loop.time() + self._round_trip
        with suppress(OSError, asyncio.CancelledError):  # asyncio would complain of a handler that was cancelled
            far, to_server = await asyncio.open_connection(self._host, self._server.port)
            try:
                await asyncio.gather(self._pass(near, to_server, opened), self._pass(far, to_client, opened))
            finally:
                to_server.transport.abort()
        to_client.transport.abort()

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, opened: float) -> None:
        """Pass one direction on, until its end."""
        way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(UNDER_WAY)
        reading = asyncio.create_task(self._read(source, way, opened))
        try:
            await self._write(way, sink)
        finally:
            reading.cancel()

    async def _read(self, source: asyncio.StreamReader, way: asyncio.Queue[tuple[float, bytes]], opened: float) -> None:
        block = b" "
        while block:
            try:
                block = await source.read(BLOCK)
            except OSError:
                block = b""
            await way.put((max(self._loop.time(), opened) + self._round_trip / 2, block))

    async def _write(self, way: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while True:
                due, block = await way.get()
                await asyncio.sleep(due - self._loop.time())
                if not block:
                    break
                sink.write(block)
                await sink.drain()
            sink.write_eof()


class FarHub(Premises):
    """Put a distance in front of the hub's token service and CDN, and of a second registry that leads to them.

    The registry stands on the hub's storage, so that it has all that is in the hub.
    """

    def __init__(self, hub: Hub, round_trip: float) -> None:
        super().__init__(hub.authority)
        self._hub = hub
        self._round_trip = round_trip
        self.tokens = hub.tokens

    def start(self) -> None:
        """Start the registry and the distances."""
        hub = self._hub
        self._to_cdn, self._to_tokens = self._distance(hub.cdn_url), self._distance(hub.tokens.url)
        self.cdn_url, realm = self._to_cdn.url, f"{self._to_tokens.url}/token"
        more = REDIRECT_TO_CDN + TOKEN_AUTH
        values = {"cdn": self.cdn_url, "ca": self.ca_file, **hub.tokens.config, "realm": realm}
        self._registry = self.docker_registry("registry", REGISTRY_HOST, hub.storage, more, **values)
        self._registry.wait()
        self._to_registry = self._distance(self._registry.url)
        self.registry_url = self._to_registry.url
        table = {"endpoints": [self.registry_url], "realms": [self._to_tokens.url], "ca_file": str(self.ca_file)}
        self.registries_file: Path = write_registries(self.folder / "registries.toml", {"docker.io": table})
        self.forget()

    def registry_requests(self) -> list[RegistryRequest]:
        """Return what the registry was asked since the last forget()."""
        return self._registry.requests()

    def connections(self) -> dict[str, int]:
        """Return how many connections each part has had so far."""
        parts = {"registry": self._to_registry, "token service": self._to_tokens, "CDN": self._to_cdn}
        return {part: distance.connections for part, distance in parts.items()}

    def forget(self) -> None:
        """Clear the records of all three parts; call it while no request is under way."""
        self._registry.forget()
        self._hub.forget()

    def _distance(self, url: str) -> Distance:
        return self._stack.enter_context(Distance(url, self._round_trip))
