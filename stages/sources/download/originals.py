"""Downloads the images of source rows."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from stages.sources.base import Emit, Original
from stages.sources.download.config import DownloadConfig
from stages.sources.download.downloader import download
from stages.sources.download.open_url import Endpoint


def download_originals(
    originals: Iterable[Original],
    scratch: Path,
    config: DownloadConfig,
    emit: Emit,
    *,
    addresses: Mapping[str, str] | None = None,
    own: Endpoint | None = None,
) -> None:
    """Emits each row with the image behind its URL; a row without a usable caption is emitted without a download.

    Args:
        addresses: where each URL is downloaded from; None: from itself.
        own: an address of this program itself, allowed though it is private.
    """
    urls: dict[int, str] = {}
    wanted: dict[int, Original] = {}
    for original in originals:
        if original.cleaned().reason is not None:
            emit(original)
            continue
        url = original.url or ""
        urls[original.row] = url if addresses is None else addresses[url]
        wanted[original.row] = original

    def result(row: int, data: bytes | None, reason: str | None, detail: str) -> None:
        emit(replace(wanted[row], data=data, reason=reason, detail=detail))

    if urls:
        download(urls, scratch, config, result, own=own)
