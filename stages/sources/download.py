"""Downloads the pictures of one shard with img2dataset, in this process, with failures by class.

img2dataset's own distributors are not used: they have no backpressure and leave partial files. Here one
shard at a time goes through its `Downloader`, without re-encoding, and each result is handed on at once.
"""

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

Result = Callable[[int, bytes | None, str | None, str], None]
"""Called with row, bytes or None, drop reason or None, detail."""

_RETRYABLE = re.compile(r"timeout|connection_\w+|dns_error|incomplete|download_error|http_(408|425|429|5\d\d)")
_BACKOFF_S = 0.5


@dataclass(frozen=True, slots=True)
class DownloadOptions:
    """How to download; none of it changes what a successful download returns."""

    threads: int
    timeout_s: float
    retries: int
    user_agent_token: str | None
    disallowed_headers: tuple[str, ...]


def load_downloader() -> tuple[type[Any], type[Any]]:
    """img2dataset's Downloader and Resizer; the first import takes seconds."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for its newest version
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer

    return Downloader, Resizer


def download(urls: Mapping[int, str], scratch: Path, options: DownloadOptions, result: Result) -> None:
    """Fetches row -> URL; failures that may pass (timeouts, refused, 429, 5xx) are tried again with backoff.

    Args:
        scratch: folder for img2dataset's temporary files.
        result: called once for each row, from this thread.
    """
    pending: dict[int, str] = {}
    for row, url in urls.items():
        if _is_http(url):
            pending[row] = url
        else:
            result(row, None, "invalid_url", "only http and https URLs are fetched")
    for attempt in range(options.retries + 1):
        again: dict[int, str] = {}
        last = attempt == options.retries

        def sort_out(row: int, data: bytes | None, message: str | None, last: bool = last) -> None:
            if data is not None:
                result(row, data, None, "")
                return
            reason = classify(message or "")
            if not last and _RETRYABLE.fullmatch(reason):
                again[row] = pending[row]  # noqa: B023 - called within this iteration only
            else:
                result(row, None, reason, message or "")

        if pending:
            _download_once(pending, scratch / f"attempt-{attempt}", options, sort_out)
        pending = again
        if not pending:
            return
        time.sleep(_BACKOFF_S * 2**attempt)


def _is_http(url: str) -> bool:
    try:
        return urlsplit(url).scheme in ("http", "https") and url.isprintable()
    except ValueError:  # brackets without an IPv6 address, characters no host name can have
        return False


_PATTERNS = (
    (re.compile(r"redirect error that would lead to an infinite loop"), "redirect_loop"),
    (re.compile(r"X-Robots-Tag"), "robots_disallowed"),
    (re.compile(r"HTTP Error (\d{3})"), r"http_\1"),
    (re.compile(r"timed out", re.I), "timeout"),
    (re.compile(r"Connection refused", re.I), "connection_refused"),
    (re.compile(r"Connection reset|Remote end closed|Broken pipe", re.I), "connection_reset"),
    (re.compile(r"Name or service not known|name resolution|getaddrinfo|nodename|No address", re.I), "dns_error"),
    (re.compile(r"certificate|SSL", re.I), "tls_error"),
    (re.compile(r"IncompleteRead", re.I), "incomplete"),
    (re.compile(r"unknown url type|no host given|nonnumeric port|control characters|codec", re.I), "invalid_url"),
)


def classify(message: str) -> str:
    """Turns an error message of the downloader into one of a bounded set of reasons."""
    for pattern, reason in _PATTERNS:
        found = pattern.search(message)
        if found:
            return found.expand(reason)
    return "download_error"


def _download_once(
    urls: Mapping[int, str],
    folder: Path,
    options: DownloadOptions,
    result: Callable[[int, bytes | None, str | None], None],
) -> None:
    Downloader, Resizer = load_downloader()
    folder.mkdir(parents=True)
    rows = list(urls)
    shard_file = folder / "urls.arrow"
    table = pa.table({"url": [urls[row] for row in rows]})
    with pa.OSFile(str(shard_file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)

    answered: set[int] = set()
    failures: list[Exception] = []

    class HandOn:
        """img2dataset's sample writer interface; its key is the position in the URL table.

        It prints what `write` raises and goes on, so the first failure is kept and raised at the end.
        """

        def __init__(self, *_: object) -> None: ...

        def write(self, data: bytes | None, key: str, caption: object, meta: Mapping[str, object]) -> None:
            del caption
            message = meta["error_message"]
            answered.add(int(key))
            if failures:
                return
            try:
                result(rows[int(key)], data, None if message is None else str(message))
            except Exception as error:  # noqa: BLE001 - raised again below
                failures.append(error)

        def close(self) -> None: ...

    Downloader(
        sample_writer_class=HandOn,
        resizer=Resizer(256, "no", resize_only_if_bigger=False, disable_all_reencoding=True),
        thread_count=min(options.threads, len(rows)),
        save_caption=False,
        extract_exif=False,
        output_folder=str(folder),
        column_list=["url"],
        timeout=options.timeout_s,
        number_sample_per_shard=max(10, len(rows)),
        oom_shard_count=5,
        compute_hash=None,
        verify_hash_type=None,
        encode_format="bin",
        retries=0,
        user_agent_token=options.user_agent_token,
        disallowed_header_directives=list(options.disallowed_headers),
    ).download_shard((0, str(shard_file)))
    if failures:
        raise failures[0]
    if len(answered) < len(rows):
        raise RuntimeError(f"img2dataset gave no result for {len(rows) - len(answered)} of {len(rows)} URLs")
