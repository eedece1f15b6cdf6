"""A load generator that costs little: one thread, asyncio's streams and HTTP/1.1 by hand.

It shares the machine's cores with the server that it measures. A thread a client with httpx took 20 ms of CPU a
request at 160 clients, more than the server did.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_TIMEOUT_SECONDS = 60


@dataclass
class Load:
    """What clients saw.

    Attributes:
        seconds: of each answer 200, from its first byte sent to its last byte received.
        by_status: answers by status; 0 is a connection lost.
        took: seconds in all.
    """

    seconds: list[float] = field(default_factory=list)
    by_status: dict[int, int] = field(default_factory=dict)
    took: float = 0.0


class Client:
    """One connection, opened again when it is lost."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, message: bytes) -> tuple[int, dict[str, str]]:
        """Send a request, read the answer whole; its status (0: lost) and headers."""
        try:
            return await asyncio.wait_for(self._ask(message), _TIMEOUT_SECONDS)
        except (OSError, EOFError, TimeoutError, asyncio.TimeoutError):
            await self.close()
            return 0, {}

    async def _ask(self, message: bytes) -> tuple[int, dict[str, str]]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        writer.write(message)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        if headers.get("transfer-encoding") == "chunked":
            while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
                await reader.readexactly(size + 2)
            await reader.readuntil(b"\r\n")
        else:
            await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            await self.close()
        return int(head[0].split()[1]), headers

    async def close(self) -> None:
        """End the connection."""
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].close()
            with contextlib.suppress(OSError):
                await streams[1].wait_closed()


def load(
    address: str, contents: list[bytes], clients: int, seconds: float, pause: float = 0.0, *, patient: bool = False
) -> Load:
    """So many closed-loop clients that post DICOM objects for so long.

    Args:
        pause: seconds between an answer and the next request.
        patient: who is refused comes again after Retry-After, else after 50 ms whatever it says.
    """
    place = urlsplit(address)
    head = f"POST /v1/predict HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/dicom\r\nContent-Length: "
    messages = [f"{head}{len(data)}\r\n\r\n".encode() + data for data in contents]
    found = Load()

    async def one(number: int, end: float) -> None:
        client = Client(str(place.hostname), int(place.port or 80))
        while (started := time.perf_counter()) < end:
            number += 1
            status, headers = await client.ask(messages[number % len(messages)])
            now = time.perf_counter()
            found.by_status[status] = found.by_status.get(status, 0) + 1
            if status == 200:
                found.seconds.append(now - started)
                wait = pause
            else:
                wait = float(headers.get("retry-after", 0.05)) if patient else 0.05
            await asyncio.sleep(max(0.0, min(wait, end - now)))
        await client.close()

    async def everyone() -> None:
        end = time.perf_counter() + seconds
        await asyncio.gather(*(one(number, end) for number in range(clients)))

    started = time.perf_counter()
    asyncio.run(everyone())
    found.took = time.perf_counter() - started
    return found
