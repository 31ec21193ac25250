"""The settings of a captioner that asks servers, and what it sends them."""

import base64
import io
import os
from collections.abc import Mapping
from typing import Any, Self
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from PIL import Image
from pydantic import Field, field_validator, model_validator

from pipeline.errors import MachineError
from stages.captioners.base import ModelCaptionerConfig
from stages.captioners.budget import Price

_OWN = ("model", "messages", "max_tokens", "temperature", "seed", "stream", "n")


class ServerCaptionerConfig(ModelCaptionerConfig):
    """One or more servers of one model."""

    machine_fields = ModelCaptionerConfig.machine_fields | {
        "base_url",
        "max_in_flight",
        "api_key_env",
        "timeout_s",
        "wait_for_server_s",
        "tries",
        "price_per_million",
        "max_requests",
        "max_cost",
    }

    model: str = Field(min_length=1)
    """The model's name at the server."""
    base_url: str | tuple[str, ...]
    """Address of the API, such as `http://127.0.0.1:8000/v1`; or a list of servers of the same model, which share the
    requests."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of each request, such as `{top_p: 0.9}` or `{response_format: {type: json_object}}`."""
    max_in_flight: int = Field(default=64, ge=1)
    """Requests at once, to all servers together."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key. It has to be set for the workers of a cluster, too.
    null: no key is sent."""
    timeout_s: float = Field(default=180.0, gt=0)
    """Longest time for one answer."""
    wait_for_server_s: float = Field(default=600.0, ge=0)
    """How long a server that is down, busy (429, 503) or asks for a pause by Retry-After is waited for. Then the run
    ends, and the same command goes on."""
    tries: int = Field(default=3, ge=1)
    """How often a request is made that times out, is answered with 500, or with something that is no answer of this
    model. Some servers answer 500 to an image that they cannot read."""
    price_per_million: Price | None = None
    """Price of a million tokens, for plan, report and max_cost."""
    max_requests: int | None = Field(default=None, ge=1)
    """The run ends with exit code 3 once so many requests were answered, those of earlier runs of the folder included.
    The few requests that each start makes to find out about the model do not count."""
    max_cost: float | None = Field(default=None, gt=0)
    """The same for money, by price_per_million: no request is made that might cost more with its longest answer."""

    @field_validator("base_url")
    @classmethod
    def _check_urls(cls, urls: str | tuple[str, ...]) -> str | tuple[str, ...]:
        listed = (urls,) if isinstance(urls, str) else urls
        for url in listed:
            if not _is_address(url):
                raise ValueError(f"{url!r} is no http or https URL")
        if not listed or len(set(listed)) < len(listed):
            raise ValueError("give one URL or several different ones")
        return urls

    @field_validator("extra_body")
    @classmethod
    def _check_extra(cls, extra: dict[str, Any]) -> dict[str, Any]:
        if own := [name for name in extra if name in _OWN]:
            raise ValueError(f"{own[0]} is set otherwise; leave it out")
        return extra

    @model_validator(mode="after")
    def _check_price(self) -> Self:
        if self.max_cost is not None and self.price_per_million is None:
            raise ValueError("max_cost needs price_per_million, as {input: 0.1, output: 0.4}")
        return self

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers, without a slash at the end."""
        listed = (self.base_url,) if isinstance(self.base_url, str) else self.base_url
        return tuple(url.rstrip("/") for url in listed)

    def key(self) -> str | None:
        """The key.

        Raises:
            MachineError: the environment variable is not set.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise MachineError(
                f"captioners.{self.name}.api_key_env: the environment variable {self.api_key_env} is not set; set it "
                "to the key, or leave api_key_env out"
            )
        if not (key.isascii() and key.isprintable()):
            raise MachineError(
                f"captioners.{self.name}.api_key_env: {self.api_key_env} holds characters that no key has (line "
                "breaks, or letters beyond ASCII); set it to the key alone"
            )
        return key

    def body(self, prompt: str, image_url: str, seed: int, temperature: float, max_tokens: int) -> dict[str, Any]:
        """A request as JSON."""
        content = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": prompt}]
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            **self.extra_body,
        }

    def made_by(self) -> dict[str, Any]:
        return {**super().made_by(), "image_format": IMAGE_FORMAT}


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and " " not in url
    except ValueError:
        return False


def proxy_of(url: str) -> str | None:
    """The proxy that the environment names for an address; asked once, for it takes a while."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)


IMAGE_FORMAT: Mapping[str, Any] = {"format": "JPEG", "quality": 95, "subsampling": 0}
"""How images are sent."""


def data_url(image: Image.Image) -> str:
    """An image as a data URL."""
    file = io.BytesIO()
    image.save(file, **IMAGE_FORMAT)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
