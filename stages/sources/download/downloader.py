"""Downloads the images of one shard with img2dataset, in this process, with failures by class.

img2dataset's own distributors are not used: they have no backpressure and leave partial files. Here one
shard at a time goes through its `Downloader`, without re-encoding, and each result is handed on at once.

Its `Downloader` has neither limits nor an order by host. So two names that its code uses are bound to ours, for this
call alone: `download_image_with_retry` (each of its threads asks `HostQueue` which URL comes next) and the `urllib` of
`download_image` (which keeps its User-Agent and its reading of X-Robots-Tag, but opens URLs with `FetchAttempt`).
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Semaphore
from types import FunctionType, SimpleNamespace
from typing import Any
from urllib.request import Request

import pyarrow as pa

from stages.import_alone import import_alone
from stages.sources.download.config import DownloadConfig
from stages.sources.download.host_queue import Failures, HostQueue, Ticket, num_threads
from stages.sources.download.open_url import Endpoint, FetchAttempt, make_opener
from stages.sources.download.uri import to_uri
from stages.sources.records.row_text import text_array

Result = Callable[[int, bytes | None, str | None, str], None]
"""Called with row, bytes or None, drop reason or None, detail."""

_RETRYABLE = re.compile(r"timeout|connection_\w+|dns_error|incomplete|download_error|http_(408|425|429|5\d\d)")
_UNREACHABLE = re.compile(r"timeout|connection_\w+|dns_error|tls_error")
_BACKOFF_S = 0.5
_host_failures: Failures = {}
"""From one shard of this process to its next."""


def load_downloader() -> Any:
    """img2dataset's module `downloader`, without the rest of it, which takes seconds to import."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # where all is imported, it would ask the network
    return import_alone("img2dataset.downloader", unused=("wandb",))


def download(
    urls: Mapping[int, str], scratch: Path, config: DownloadConfig, result: Result, *, own: Endpoint | None = None
) -> None:
    """Fetches row -> URL; failures that may pass (timeouts, refused, 429, 5xx) are tried again with backoff.

    Args:
        scratch: folder for img2dataset's temporary files.
        result: called once for each row, from this thread.
        own: an address of this program itself, allowed though it be private.
    """
    good: dict[int, str] = {}
    for row, url in urls.items():
        try:
            good[row] = to_uri(url)
        except ValueError as error:
            result(row, None, "invalid_url", str(error))
    if good:
        _run_downloader(good, scratch, _Fetcher(list(good.values()), config, own), result)


class _Fetcher:
    """What each thread of the Downloader calls, as often as there are URLs: fetches the one whose turn it is."""

    def __init__(self, urls: Sequence[str], config: DownloadConfig, own: Endpoint | None):
        self.config = config
        self.own = own
        self.queue = HostQueue(dict(enumerate(urls)), config, failures=_host_failures)
        self.places = Semaphore(2 * config.threads)
        """For images that were fetched and not yet handed on."""
        self.answered: set[int] = set()
        self.failure: Exception | None = None
        self._downloader = load_downloader()
        self._opener = make_opener()

    def stop(self, failure: Exception) -> None:
        """Ends the shard with its first failure. Raised within the Downloader, it would block its threads."""
        self.failure = self.failure or failure
        self.queue.give_up("stopped")

    def __call__(self, _row: object, *, retries: int, **options: Any) -> tuple[int, Any, str | None]:
        """The result of one URL, whichever row was given: key, stream, message."""
        while True:
            turn = self.queue.take()
            if turn.verdict is not None:
                self.answered.add(turn.key)
                return turn.key, None, turn.verdict
            visit = FetchAttempt(self.config, self._opener, self.own, turn.spent_s)
            turn.received = lambda visit=visit: visit.received
            try:
                stream, turn.message = self._fetch(turn, visit, options)
            except Exception as error:  # noqa: BLE001 - raised when the Downloader has ended
                self.stop(error)
                stream, turn.message = None, str(error)
            turn.spent_s += visit.spent_s
            turn.fetched = True
            if stream is not None:
                self.places.acquire()
            if not self._give_back(turn, visit):
                self.answered.add(turn.key)
                return turn.key, stream, turn.message

    def _fetch(self, turn: Ticket, visit: FetchAttempt, options: Mapping[str, Any]) -> tuple[Any, str | None]:
        urllib = SimpleNamespace(request=SimpleNamespace(Request=Request, urlopen=visit.open))
        _, stream, message = _bind(self._downloader.download_image, urllib=urllib)((turn.key, turn.url), **options)
        if stream is not None and not visit.opened:
            raise RuntimeError(f"img2dataset did not open {turn.url} within the limits; install img2dataset 1.47")
        return stream, message

    def _give_back(self, turn: Ticket, visit: FetchAttempt) -> bool:
        """Whether the URL is to be tried again. A failure after a redirect says nothing about the URL's host."""
        reason = "" if turn.message is None else classify(turn.message)
        turn.tries += 1
        pause_s = max(_BACKOFF_S * 2 ** (turn.tries - 1), visit.retry_after_s)
        retry_in_s = None
        if (
            turn.tries <= self.config.retries
            and _RETRYABLE.fullmatch(reason)
            and visit.retry_after_s <= self.config.max_retry_after_s
            and turn.spent_s + pause_s < self.config.deadline_s
        ):
            retry_in_s = pause_s
            turn.spent_s += pause_s
        if visit.redirects:
            self.queue.give_back(turn, retry_in_s=retry_in_s)
        else:
            failed = visit.retry_after_s > 0 or _UNREACHABLE.fullmatch(reason) is not None
            self.queue.give_back(turn, failed=failed, pause_s=visit.retry_after_s, retry_in_s=retry_in_s)
        return retry_in_s is not None


def _bind(function: Any, **names: object) -> FunctionType:
    """A copy of a function of img2dataset for which these names of its module stand for something else.

    Raises:
        RuntimeError: its module has no such names.
    """
    unknown = names.keys() - function.__globals__.keys()
    if unknown:
        raise RuntimeError(f"{function.__module__} has no {', '.join(unknown)}; install img2dataset 1.47")
    values = {**function.__globals__, **names}
    return FunctionType(function.__code__, values, function.__name__, function.__defaults__, function.__closure__)


_PATTERNS = (
    (
        re.compile(
            r"^(too_large|too_many_redirects|forbidden_address|host_unreachable|invalid_url|invalid_response): "
        ),
        r"\1",
    ),
    (re.compile(r"^got more than \d+ bytes when reading"), "invalid_response"),
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


def _run_downloader(urls: Mapping[int, str], folder: Path, fetcher: _Fetcher, result: Result) -> None:
    downloader = load_downloader()
    rows = list(urls)
    shard_file = folder / "urls.arrow"
    table = pa.table({"url": text_array(list(urls.values()))})
    with pa.OSFile(str(shard_file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)

    answered: set[int] = set()

    class HandOn:
        """img2dataset's sample writer interface; its key is the position in the URL table.

        It prints what `write` raises and continues, so the first failure is kept and raised at the end.
        """

        def __init__(self, *_: object) -> None: ...

        def write(self, data: bytes | None, key: str, caption: object, meta: Mapping[str, object]) -> None:
            del caption
            message = meta["error_message"]
            answered.add(int(key))
            if fetcher.failure:
                return
            try:
                if message is None:
                    result(rows[int(key)], data, None, "")
                else:
                    result(rows[int(key)], None, classify(str(message)), str(message))
            except Exception as error:  # noqa: BLE001 - raised again below
                fetcher.stop(error)

        def close(self) -> None: ...

    config = fetcher.config

    def hand_through(stream: Any, boxes: object) -> tuple[object, ...]:
        """img2dataset's resizer interface, without re-encoding: image, four sizes that are not known, no message.

        The first that happens to an image on its way to `HandOn`, which comes next.
        """
        del boxes
        fetcher.places.release()
        return stream.read(), None, None, None, None, None

    shard = downloader.Downloader(
        sample_writer_class=HandOn,
        resizer=hand_through,
        thread_count=min(num_threads(config), len(rows)),
        save_caption=False,
        extract_exif=False,
        output_folder=str(folder),
        column_list=["url"],
        timeout=config.timeout_s,
        number_sample_per_shard=max(10, len(rows)),
        oom_shard_count=5,
        compute_hash=None,
        verify_hash_type=None,
        encode_format="bin",
        retries=0,
        user_agent_token=config.user_agent_token,
        disallowed_header_directives=list(config.disallowed_headers),
    )
    _bind(type(shard).download_shard, download_image_with_retry=fetcher)(shard, (0, str(shard_file)))
    if fetcher.failure:
        raise fetcher.failure
    if len(answered) < len(rows):
        raise RuntimeError(f"img2dataset gave no result for {len(rows) - len(answered)} of {len(rows)} URLs")
    if len(fetcher.answered) < len(rows):
        raise RuntimeError("img2dataset fetched URLs on its own, past the limits; install img2dataset 1.47")
