"""A server of captions that costs next to nothing, as a process of its own; see `benchmarks.captions`.

    python -m benchmarks.caption_server

It prints its port. Below `/paced/v1` a request takes 200 ms and 64 are served at a time; below `/instant/v1` it is
answered at once. Both answer with the same text. `GET /times` says when each of the former was answered since the last
call, `GET /answered` how many requests were answered in all.
"""

import asyncio
import json
import re
from collections import deque

AT_ONCE, SECONDS = 64, 0.2
MODEL = "tiny/describer"
_TEXT = (
    "A red bicycle with a wicker basket leans against a white wall in the afternoon sun. Its shadow falls on "
    "cobblestones, beside a pot of yellow tulips and a sleeping cat. Behind an open window with green shutters "
    "a vase stands on the sill, and on the right a narrow street leads down towards the sea, where two boats lie at "
    "anchor under a sky with a few thin clouds."
)
_CHOICE = {"index": 0, "message": {"role": "assistant", "content": _TEXT}, "finish_reason": "stop"}
_USAGE = {"prompt_tokens": 100, "completion_tokens": 80, "total_tokens": 180}
_CAPTION = json.dumps({"model": MODEL, "choices": [_CHOICE], "usage": _USAGE}).encode()
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Pace:
    """Lets 64 requests at a time take 200 ms each, and notes when each was answered."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.answered = 0
        self._busy = 0
        self._waiting: deque[Connection] = deque()

    def begin(self, connection: "Connection") -> None:
        if self._busy == AT_ONCE:
            self._waiting.append(connection)
            return
        self._busy += 1
        self._serve(connection)

    def _serve(self, connection: "Connection") -> None:
        asyncio.get_running_loop().call_later(SECONDS, self._end, connection)

    def _end(self, connection: "Connection") -> None:
        self.answered += 1
        self.times.append(asyncio.get_running_loop().time())
        connection.answer(_CAPTION)
        if self._waiting:
            self._serve(self._waiting.popleft())
        else:
            self._busy -= 1


class Connection(asyncio.Protocol):
    """One connection, which is kept alive; one request at a time."""

    def __init__(self, pace: Pace):
        self._pace = pace
        self._data = bytearray()
        self._missing = 0
        self._path = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._missing:
            self._missing -= len(data)
        else:
            self._data += data
            end = self._data.find(b"\r\n\r\n")
            if end < 0:
                return
            length = _LENGTH.search(self._data, 0, end)
            self._path = bytes(self._data[: self._data.find(b"\r\n")].split()[1])
            self._missing = end + 4 + (int(length[1]) if length else 0) - len(self._data)
            self._data.clear()
        if not self._missing:
            self._request()

    def _request(self) -> None:
        pace = self._pace
        if self._path == b"/paced/v1/chat/completions":
            pace.begin(self)
        elif self._path == b"/instant/v1/chat/completions":
            pace.answered += 1
            self.answer(_CAPTION)
        elif self._path == b"/times":
            self.answer(json.dumps(pace.times).encode())
            pace.times.clear()
        elif self._path == b"/answered":
            self.answer(json.dumps(pace.answered).encode())
        else:
            self.answer(b"{}")

    def answer(self, body: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
            self._transport.write(head + body)


async def serve() -> None:
    """Serves until the process is ended."""
    pace = Pace()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(pace), "127.0.0.1", backlog=1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve())
