"""A server on loopback that speaks the chat-completions API with images, and answers from the bytes of the image."""

import asyncio
import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

MODEL = "tiny/describer"
CONTENT_FAULTS = ("empty", "refused", "cut", "loop")
"""What is wrong with every second answer about such an image, by its seed."""
LASTING_FAULTS = ("html", "half", "other_model", "error_500", "too_large")
"""What is wrong with all answers about such an image."""
FAULTS = (*CONTENT_FAULTS, *LASTING_FAULTS, "busy")
"""busy: the first request about an image is answered with 429 or 503."""


@dataclass(frozen=True)
class Asked:
    """A request."""

    body: Mapping[str, Any]
    image: bytes
    number: str
    """Digest of the image."""
    authorization: str

    @property
    def prompt(self) -> str:
        return next(part["text"] for part in self.body["messages"][0]["content"] if part["type"] == "text")


@dataclass
class CaptionServer:
    """The server; its fields may be changed while it serves."""

    model: str = MODEL
    fault_share: float = 0.0
    seconds: float = 0.0
    key: str | None = None
    at_once: int = 1000
    most_answers: int | None = None
    """After so many it is busy."""
    fault: Callable[[Asked], str | None] | None = None
    word: str = "shape"
    usage: bool = True
    url: str = ""
    requests: list[Asked] = field(default_factory=list)
    by_image_and_seed: Counter[tuple[str, int]] = field(default_factory=Counter)
    by_image: Counter[str] = field(default_factory=Counter)
    most_in_flight: int = 0
    keep: bool = True
    in_flight: int = 0
    answered: int = 0

    def fault_of(self, asked: Asked) -> str | None:
        """What is wrong with the answer to a request."""
        if self.fault is not None:
            return self.fault(asked)
        return fault_of(asked.number, int(asked.body["seed"]), self.fault_share)

    def caption(self, asked: Asked) -> str:
        return caption_of(asked.number, self.word)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        data, more = bytearray(), True
        while more:
            message = await receive()
            data += message.get("body", b"")
            more = message.get("more_body", False)
        if scope["path"].endswith("/models"):
            entry = {"id": self.model, "object": "model", "created": len(self.requests), "max_model_len": 4096}
            await reply(send, 200, {"object": "list", "data": [entry]})
            return
        headers = {name.decode().lower(): value.decode() for name, value in scope["headers"]}
        body = json.loads(data)
        url = next(part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url")
        image = base64.b64decode(url.partition(",")[2])
        number = hashlib.sha256(image).hexdigest()[:12]
        asked = Asked(body if self.keep else {**body, "messages": []}, image, number, headers.get("authorization", ""))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self._answer(asked, send)
        finally:
            self.in_flight -= 1

    async def _answer(self, asked: Asked, send: Any) -> None:
        if self.keep:
            self.requests.append(asked)
        if self.most_answers is not None and self.answered >= self.most_answers:
            await reply(send, 503, {"error": "shutting down"})
            return
        if self.key is not None and asked.authorization != f"Bearer {self.key}":
            await reply(send, 401, {"error": {"message": f"wrong key {asked.authorization}"}})
            return
        self.by_image_and_seed[asked.number, asked.body["seed"]] += 1
        self.by_image[asked.number] += 1
        while self.in_flight > self.at_once:
            await asyncio.sleep(0.001)
        if self.seconds:
            await asyncio.sleep(self.seconds)
        self.answered += 1
        fault = self.fault_of(asked)
        text, finish_reason, model = self.caption(asked), "stop", self.model
        if fault == "html":
            await reply(send, 200, b"<html><body>Bad gateway</body></html>", content_type=b"text/html")
            return
        if fault == "half":
            await reply(send, 200, b'{"choices": [{"mess', claimed=500)
            return
        if fault == "error_500":
            await reply(send, 500, {"error": "Internal Server Error"})
            return
        if fault == "too_large":
            await reply(send, 413, {"error": "image has too many pixels"})
            return
        if fault == "bad_request":
            await reply(send, 400, {"error": "cannot read the image"})
            return
        if fault == "busy" and self.by_image[asked.number] == 1:
            status = 429 if int(asked.number, 16) % 2 else 503
            await reply(send, status, {"error": "too many requests"}, retry_after="0")
            return
        if fault == "other_model":
            model = "tiny/another"
        elif fault == "empty":
            text = "  \n"
        elif fault == "refused":
            text = "I'm sorry, but I can't help with that."
        elif fault == "cut":
            finish_reason = "length"
        elif fault == "loop":
            text = "a red dot and " * 30
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
        usage = {"prompt_tokens": 100, "completion_tokens": len(text.split()), "total_tokens": 0}
        await reply(send, 200, {"model": model, "choices": [choice], **({"usage": usage} if self.usage else {})})


def caption_of(number: str, word: str = "shape") -> str:
    """The caption of an image by its digest."""
    return f"A {word} numbered {number}, drawn on a plain ground."


def fault_of(number: str, seed: int, share: float) -> str | None:
    """The fault of a share of the images, all kinds alike; the same each time."""
    draw = int(number[:8], 16)
    if draw / 2**32 >= share:
        return None
    fault = FAULTS[int(number[8:], 16) % len(FAULTS)]
    if fault in CONTENT_FAULTS and hashlib.sha256(f"{number}{seed}".encode()).digest()[0] % 2:
        return None
    return fault


async def reply(
    send: Any,
    status: int,
    content: object,
    content_type: bytes = b"application/json",
    claimed: int | None = None,
    **headers: str,
) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    listed = [(b"content-type", content_type), (b"content-length", str(claimed or len(data)).encode())]
    listed += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": listed})
    await send({"type": "http.response.body", "body": data})


@contextmanager
def serve(server: CaptionServer | None = None, port: int = 0) -> Iterator[CaptionServer]:
    """Serves while the block runs, in a thread of this process."""
    app = server or CaptionServer()
    config = uvicorn.Config(app, port=port, log_level="critical", access_log=False, lifespan="off")
    running = uvicorn.Server(config)
    running.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive(), "the server does not start"
        threading.Event().wait(0.01)
    app.url = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}/v1"
    try:
        yield app
    finally:
        running.should_exit = True
        thread.join(20)
