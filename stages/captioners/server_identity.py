"""Who a server is: what it says about the model, and what it answers to two fixed images."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from pipeline.errors import MachineError
from pipeline.fingerprint import differences
from stages.captioners.base import Answer
from stages.captioners.budget import Budget
from stages.captioners.server_config import ServerCaptionerConfig, data_url, proxy_of

if TYPE_CHECKING:
    import aiohttp

_PROMPT = "Describe this image in one sentence."
_MAX_TOKENS = 24
_OF_MODEL = ("id", "root", "max_model_len")
"""Fields of an entry of /v1/models that do not change from start to start."""
_OF_SERVER = ("server", "openai-version")
"""Headers that say of which version a server is."""


class Client(Protocol):
    """Asks the servers."""

    config: ServerCaptionerConfig
    budget: Budget
    session: "aiohttp.ClientSession"
    named_by: dict[str, str | None]

    async def ask(self, body: bytes, url: str, /) -> Answer:
        """The answer of one server to a request."""
        ...


def probe_images() -> list[Image.Image]:
    """Two images of 64 x 64 px: a gradient, and a red disc on white."""
    y, x = np.mgrid[0:64, 0:64]
    gradient = np.stack([4 * x, 4 * y, 255 - 4 * x], axis=-1).astype(np.uint8)
    disc = np.full((64, 64, 3), 255, np.uint8)
    disc[(x - 32) ** 2 + (y - 32) ** 2 < 400] = (200, 20, 20)
    return [Image.fromarray(gradient), Image.fromarray(disc)]


def probes(config: ServerCaptionerConfig) -> list[bytes]:
    """A request about each of these images, as JSON."""
    bodies = [config.body(_PROMPT, data_url(image), 0, 0.0, _MAX_TOKENS) for image in probe_images()]
    return [json.dumps(body).encode() for body in bodies]


async def identify(captioner: Client, urls: list[str]) -> dict[str, Any]:
    """Finds out who the servers are; each is asked twice about each image, with temperature 0.

    Returns:
        `answers_as`: the model's name in answers; `listed`: its entry in /v1/models, if there is one; `probe`: the
        answers, or None where the server does not repeat them; `headers`, which say its version.
    Raises:
        MachineError: the servers differ.
    """
    found = [await _identify(captioner, url) for url in urls]
    for url, other in zip(urls[1:], found[1:], strict=True):
        if changes := server_changes(found[0], other):
            raise MachineError(
                f"captioners.{captioner.config.name}.base_url: {url} serves another model than {urls[0]}: "
                f"{'; '.join(changes)}; serve the same on all, or leave one out"
            )
    return found[0]


async def _identify(captioner: Client, url: str) -> dict[str, Any]:
    config = captioner.config
    texts: list[list[str]] = []
    for _ in range(2):
        answers = [await captioner.ask(data, url) for data in probes(config)]
        for answer in answers:
            captioner.budget.expect(answer.tokens_in)
            if answer.problem is not None:
                raise MachineError(
                    f"captioners.{config.name}: {url} does not caption the first image that it is asked about: "
                    f"{answer.problem[0]}: {answer.problem[1]}; check base_url, model and extra_body"
                )
        texts.append([answer.text for answer in answers])
    named = captioner.named_by.get(url)
    if named is not None and not _base(named).startswith(_base(config.model)):
        raise MachineError(
            f"captioners.{config.name}.model: {url} was asked for {config.model!r} and answers as {named!r}; set "
            "model to what it serves, or base_url to a server of this model"
        )
    listed, headers = await _listed(captioner, url)
    return {
        "answers_as": named,
        "listed": listed,
        "headers": headers,
        "probe": texts[0] if texts[0] == texts[1] else None,
    }


def _base(model: str) -> str:
    """A model's name without its owner; hosted servers add a date to it."""
    return model.rstrip("/").rpartition("/")[2].casefold()


async def _listed(captioner: Client, url: str) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """The model's entry in /v1/models, after the first request, before which some servers list none."""
    import aiohttp

    try:
        async with captioner.session.get(f"{url}/models", allow_redirects=False, proxy=proxy_of(url)) as response:
            body = await response.read()
            headers = {name: response.headers[name] for name in _OF_SERVER if name in response.headers}
        entries = json.loads(body)["data"]
        entry = next(entry for entry in entries if entry["id"] == captioner.config.model)
        return {name: entry[name] for name in _OF_MODEL if name in entry}, headers
    except (TimeoutError, aiohttp.ClientError, OSError):
        return None, {}
    except (ValueError, KeyError, TypeError, StopIteration):
        return None, headers


def server_changes(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What a server answers otherwise than it did; its version alone does not count, nor what it does not repeat."""
    told = ("answers_as", "listed", "probe")
    old, new = ({name: server.get(name) for name in told} for server in (recorded, found))
    for name in ("probe", "listed"):
        if old[name] is None or new[name] is None:
            del old[name], new[name]
    return differences(old, new)
