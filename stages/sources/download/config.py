"""The settings of downloads: how many at once, from whom, and for how long."""

from pydantic import Field

from pipeline.config import Config


class DownloadConfig(Config):
    """How to fetch URLs. Changes nothing in what a successful download returns.

    The limits hold per fetch task: with n tasks at once, one host may see n times as much.
    A host is what stands in the URL: `name` or `name:port`.
    """

    threads: int = Field(default=32, ge=1)
    """Downloads at once in each task. Those that get nowhere for two seconds, and those of hosts whose last download
    failed, do not count, so that bad hosts do not hold up the good ones; up to 3 * `threads` of them run beside the
    others."""
    max_per_host: int = Field(default=6, ge=1)
    """Downloads at once from one host (browsers take 6); other hosts go ahead of the waiting ones. Where a URL
    redirects to is not counted."""
    min_interval_s: float = Field(default=0.0, ge=0)
    """Least time between the starts of two downloads from one host."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Longest wait for a connection, the lookup of the name included, and for a server's next bytes."""
    min_bytes_per_s: float = Field(default=500.0, ge=0)
    """Least rate at which a server sends, on average over `timeout_s`; a slower one is a `timeout`, as a silent one
    is."""
    deadline_s: float = Field(default=60.0, gt=0)
    """Longest time for one image in all: lookups, redirects, further tries and the pauses between them. Only the time
    in which it waits behind other downloads from its host does not count. Over it: the reason of the last failure, or
    `timeout`."""
    max_bytes: int = Field(default=64 * 2**20, ge=1)
    """Most bytes received for one image, headers and redirects included, whatever Content-Length says; more is
    `too_large`. A task holds at most 2 * `threads` images that it has not handed on yet, beside those that are
    being received."""
    max_redirects: int = Field(default=10, ge=0)
    """Most redirects followed for one image; more are `too_many_redirects`."""
    retries: int = Field(default=2, ge=0)
    """Further tries after failures that may pass: timeouts, connection errors, HTTP 408, 425, 429, 5xx; none that
    would start after `deadline_s`."""
    max_retry_after_s: float = Field(default=30.0, ge=0)
    """Longest pause that a host gets when it answers 429 or 503 with Retry-After. If it asks for more, the rest of
    its URLs in the shard are dropped as `host_unreachable`."""
    max_host_failures: int = Field(default=10, ge=1)
    """Timeouts, connection errors and requested pauses in a row, after which the rest of a host's URLs in the shard
    are dropped as `host_unreachable`; `--retry-dropped host_unreachable` tries them again."""
    allow_private_addresses: bool = False
    """Whether images may come from addresses that are not on the public internet (loopback, private, link-local,
    CGNAT, cloud metadata, ...); they are `forbidden_address` otherwise. The address connected to is what is checked,
    at every redirect. Proxies of the environment (http_proxy, https_proxy, no_proxy) are used, wherever they are; then
    it is the proxy that looks names up, so only addresses written into the URL are checked here, and the proxy has
    to refuse the rest."""
    user_agent_token: str | None = None
    """A word put into the User-Agent header, and matched in X-Robots-Tag."""
    disallowed_headers: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """X-Robots-Tag directives that forbid use; such images are dropped as `robots_disallowed`."""
