"""Asks servers for captions, many requests at once: one event loop in a thread of the worker."""

import asyncio
import json
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from imagen_core.far import without_secrets
from pipeline.errors import MachineError, UnavailableError
from pipeline.stage import note_progress
from stages.captioners.base import Answer, NextQuestion, Question
from stages.captioners.budget import Budget
from stages.captioners.places import Call, Places
from stages.captioners.replies import Again, Reply, read_reply
from stages.captioners.server_config import ServerCaptionerConfig, data_url, proxy_of
from stages.captioners.server_identity import identify, probes

if TYPE_CHECKING:
    import aiohttp

_AHEAD = 8
"""Images that are ready for a request before one may be made."""
_LONGEST_PAUSE_S = 30.0
_CONNECT_S = 20.0
_SHORT_PAUSE_S = 0.05
_KEEP_ALIVE_S = 4.0
"""Less than servers keep an idle connection (uvicorn: 5 s), so that no request is sent into one that is closed."""
_AT_ONCE_AGAIN = 2
"""So often a request whose connection was closed is made again without a pause for its server."""
_MOST_BYTES = 8 * 2**20
"""Of an answer."""


@dataclass(slots=True)
class _Server:
    """One of the servers."""

    url: str
    proxy: str | None
    in_flight: int = 0
    failures: int = 0
    """One after the other."""
    paused_until: float = 0.0
    last_answer: float | None = None
    in_doubt: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while it is found out whether it answers at all."""


class ServerCaptioner:
    """Asks the servers of a captioner; see `Captioner`."""

    def __init__(self, config: ServerCaptionerConfig, key: str | None, budget: Budget):
        """Finds out about the model.

        Raises:
            PipelineError: no server can be reached for as long as it is waited for, refuses the key, or has another
                model than the others.
        """
        self.config, self.budget = config, budget
        self._key = key
        self._servers = [_Server(url, proxy_of(url)) for url in config.urls]
        self._room = Places(config.max_in_flight + min(_AHEAD, config.max_in_flight))
        self._model: str | None = None
        self.named_by: dict[str, str | None] = {}
        """What each server calls the model."""
        self._known = probes(config)[0]
        self._handed_out = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name=f"captions-{config.name}").start()
        self._run(self._open())
        self.identity: Mapping[str, Any] = self._run(identify(self, [server.url for server in self._servers]))
        self._model = self.identity["answers_as"]

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self) -> None:
        import aiohttp

        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        self.session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=self.config.timeout_s, sock_connect=_CONNECT_S),
        )
        weakref.finalize(self, _close, self._loop, self.session)
        self._sending = asyncio.Semaphore(self.config.max_in_flight)
        self._last_answer = self._loop.time()

    def answers(self, next_question: NextQuestion) -> Iterator[tuple[Question, Answer]]:
        done: SimpleQueue[tuple[Question, Answer | BaseException]] = SimpleQueue()
        failure: BaseException | None = None
        mine = 0
        try:
            with Call(self._room) as call:
                while True:
                    may_ask = failure is None and call.take(wait=mine == 0)
                    if may_ask and self._ask_next(next_question, call, done.put):
                        mine += 1
                        continue
                    if mine == 0:
                        break
                    question, answer = done.get()
                    note_progress()
                    if isinstance(answer, BaseException):
                        failure = failure or answer
                    else:
                        yield question, answer
                    mine -= 1
                    self._count(-1)
        finally:
            self._count(-mine)
        if failure is not None:
            self._wait_for_others()
            raise failure

    def _ask_next(self, next_question: NextQuestion, call: Call, put: Callable[[tuple[Question, Any]], None]) -> bool:
        """Uses a place; returns False if there is no question now."""
        asked = False
        try:
            question = next_question()
            if question is not None:
                self._hand_out(question, call, put)
                asked = True
        finally:
            if not asked:
                call.give_back(wants_more=False)
        return asked

    def _hand_out(self, question: Question, call: Call, put: Callable[[tuple[Question, Any]], None]) -> None:
        config = self.config
        url = data_url(question.image)
        body = config.body(question.prompt, url, question.seed, config.temperature, config.max_tokens)
        data = json.dumps(body).encode()
        self._count(1)

        async def work() -> None:
            try:
                async with self._sending:
                    result: Any = await self.ask(data)
            except BaseException as error:  # noqa: BLE001 - raised by the thread that waits for the answer
                result = error
            call.give_back()
            put((question, result))

        self._loop.call_soon_threadsafe(self._begin, work())

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)  # the loop itself keeps no task
        task.add_done_callback(self._tasks.discard)

    def _count(self, change: int) -> None:
        with self._lock:
            self._handed_out += change

    def _wait_for_others(self) -> None:
        """Lets other threads keep the answers that they wait for, before the run ends."""
        ends = time.monotonic() + self.config.timeout_s
        while self._handed_out and time.monotonic() < ends:
            time.sleep(0.05)

    async def ask(self, data: bytes, only: str | None = None) -> Answer:
        """The answer to a request.

        Args:
            data: the request as JSON.
            only: the one server to ask; the request is then not counted.
        Raises:
            PipelineError: no request can be answered.
        """
        tried: Counter[str] = Counter()
        began = self._loop.time()
        server: _Server | None = None
        while True:
            server = await self._server(only, server)
            while only is None and not self.budget.begin():
                await asyncio.sleep(_SHORT_PAUSE_S)
            sent = self._loop.time()
            reply = await self._send(server, data)
            if isinstance(reply, Reply):
                answer, is_answer = reply.answer, reply.answer.problem is None
                if only is None:
                    self.budget.end(answer.tokens_in, answer.tokens_out, answered=is_answer)
                self._note_answer(server)
                self.named_by.setdefault(server.url, reply.named)
                if self.budget.needs_tokens and not reply.has_usage and is_answer:
                    raise MachineError(
                        f"captioners.{self.config.name}.max_cost: {server.url} does not say how many tokens an answer "
                        "took, so money cannot be counted; leave max_cost out, and set max_requests"
                    )
                return answer
            if only is None:
                self.budget.end(answered=False)
            tried[reply.reason] += 1
            if reply.limited and tried[reply.reason] < self.config.tries:
                await asyncio.sleep(_SHORT_PAUSE_S * 2 ** tried.total())
                continue
            if reply.limited:
                if only is not None or await self._is_well(server, sent):
                    return Answer(problem=(reply.reason, reply.detail))
                tried.clear()
            elif reply.reason != "disconnected" or tried[reply.reason] > _AT_ONCE_AGAIN:
                self._pause(server, reply)
            if self._loop.time() - began >= self.config.wait_for_server_s:
                if self._loop.time() - self._last_answer < self.config.wait_for_server_s:
                    return Answer(problem=(reply.reason, reply.detail))
                raise UnavailableError(
                    f"captioners.{self.config.name}: {server.url} gave no answer for "
                    f"{self.config.wait_for_server_s:g} s (wait_for_server_s): {reply.detail}; the same command goes "
                    "on"
                )

    def _note_answer(self, server: _Server) -> None:
        server.failures, server.last_answer = 0, self._loop.time()
        self._last_answer = server.last_answer

    async def _is_well(self, server: _Server, since: float) -> bool:
        """Whether a server that gives no usable answer about an image has given one about another meanwhile, or gives
        one about a known image; otherwise it is paused."""
        async with server.in_doubt:
            if server.last_answer is not None and server.last_answer >= since:
                return True
            if server.paused_until > self._loop.time():
                return False
            reply = await self._send(server, self._known)
            if isinstance(reply, Reply):
                self._note_answer(server)
                return True
            if reply.reason == "other_model":
                raise MachineError(
                    f"captioners.{self.config.name}: {server.url} answers as {reply.detail}; the set was begun with "
                    f"{self._model!r}: serve it again, or make another set under another name"
                )
            self._pause(server, reply)
            return False

    def _pause(self, server: _Server, reply: Again) -> None:
        """Pauses a server that is down or busy."""
        if reply.pause_s > self.config.wait_for_server_s:
            raise UnavailableError(
                f"captioners.{self.config.name}: {server.url} asks for a pause of {reply.pause_s:g} s, more than "
                f"wait_for_server_s ({self.config.wait_for_server_s:g}); the same command goes on"
            )
        now = self._loop.time()
        if now >= server.paused_until:  # else another request has noticed it, too
            server.failures += 1
            pause = reply.pause_s or min(_LONGEST_PAUSE_S, 0.25 * 2 ** min(server.failures, 10))
            server.paused_until = now + pause
        elif reply.pause_s:
            server.paused_until = max(server.paused_until, now + reply.pause_s)

    async def _server(self, only: str | None, last: _Server | None) -> _Server:
        """The server with the fewest requests of those that are not paused, if possible another than the last."""
        while True:
            now = self._loop.time()
            asked = [server for server in self._servers if only in (None, server.url)]
            free = [server for server in asked if server.paused_until <= now]
            if free:
                return min(free, key=lambda server: (server is last, server.in_flight))
            await asyncio.sleep(min(server.paused_until for server in asked) - now)

    async def _send(self, server: _Server, data: bytes) -> Reply | Again:
        """One request."""
        import aiohttp

        server.in_flight += 1
        try:
            async with self.session.post(
                f"{server.url}/chat/completions", data=data, allow_redirects=False, proxy=server.proxy
            ) as response:
                body = bytearray()
                async for chunk in response.content.iter_chunked(2**16):
                    body += chunk
                    if len(body) > _MOST_BYTES:
                        return Again("no_answer", f"more than {_MOST_BYTES} bytes", limited=True)
                return self._read(server, response.status, response.headers, bytes(body))
        except TimeoutError:
            return Again("timeout", f"no answer within {self.config.timeout_s:g} s", limited=True)
        except aiohttp.ClientSSLError as error:
            if server.last_answer is None:
                raise MachineError(
                    f"captioners.{self.config.name}.base_url: {server.url} cannot be reached by TLS: "
                    f"{self._shown(error)}; check the address and its certificate"
                ) from error
            return Again("server_down", self._shown(error))
        except aiohttp.ClientPayloadError as error:
            return Again("half_answer", self._shown(error), limited=True)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionResetError) as error:
            kind = "server_down" if isinstance(error, aiohttp.ClientConnectorError) else "disconnected"
            return Again(kind, self._shown(error))
        except (aiohttp.ClientConnectionError, OSError) as error:
            return Again("server_down", self._shown(error))
        except aiohttp.ClientError as error:
            return Again("no_answer", self._shown(error), limited=True)
        finally:
            server.in_flight -= 1

    def _read(self, server: _Server, status: int, headers: Mapping[str, str], body: bytes) -> Reply | Again:
        if status in (401, 403):
            key = self.config.api_key_env
            where = f"the key in {key} is not accepted" if key else "a key is needed; set api_key_env"
            raise MachineError(f"captioners.{self.config.name}: {server.url} answers HTTP {status}: {where}")
        if status in (404, 405) or 300 <= status < 400:
            raise MachineError(
                f"captioners.{self.config.name}: {server.url}/chat/completions answers HTTP {status} for model "
                f"{self.config.model!r} ({self._shown(body)}); check base_url and model"
            )
        return read_reply(status, headers, body, self._model, self._shown)

    def _shown(self, what: object) -> str:
        """A text of a server, in a line, without the key."""
        text = what.decode("utf-8", "replace") if isinstance(what, bytes) else str(what) or type(what).__name__
        if self._key is not None:
            text = text.replace(self._key, f"<{self.config.api_key_env}>")
        line = " ".join(without_secrets(text).split())
        return line if len(line) <= 160 else f"{line[:160]}..."

    def shown(self, what: object) -> str:
        """As messages show it."""
        return self._shown(what)


def _close(loop: asyncio.AbstractEventLoop, session: "aiohttp.ClientSession") -> None:
    async def close() -> None:
        await session.close()
        loop.stop()

    asyncio.run_coroutine_threadsafe(close(), loop)
