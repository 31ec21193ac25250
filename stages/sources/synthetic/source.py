"""The embedded default: captioned scenes drawn by code, served over loopback HTTP and really downloaded."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, cast

from pydantic import Field

from pipeline.config import Config
from pipeline.stage import Shard
from stages.sources.base import Emit, InputPart, Row, Source
from stages.sources.download.config import DownloadConfig
from stages.sources.download.downloader import load_downloader
from stages.sources.urls import UrlRow, fetch_rows, row_captions


class SyntheticConfig(Config):
    """Scenes of coloured shapes with captions that describe them."""

    kind: Literal["synthetic"] = "synthetic"
    scene: Literal["shapes", "words"] = "shapes"
    """`words`: one or two coloured letters, with captions that name the colours and transcriptions."""
    num_samples: int = Field(default=288, ge=1)
    """Scenes to draw, dead links included."""
    seed: int = Field(default=0, ge=0)
    """Equal seeds draw equal scenes."""
    split: Literal["train", "held_out", "all"] = "train"
    """`train` leaves out the combinations kept for judging a trained model."""
    dead_links: int = Field(default=1, ge=0)
    """Links that answer 404, to show what a drop looks like."""
    download: DownloadConfig = DownloadConfig()
    """How to fetch."""

    def build(self) -> "SyntheticSource":
        return SyntheticSource(self)


class SyntheticSource(Source):
    """A row is one of a URL list, with the writing where there is any; the URLs are only good for this source."""

    def __init__(self, config: SyntheticConfig):
        self.config = config

    def check(self) -> None:
        return

    def parts(self) -> Iterator[InputPart]:
        yield InputPart("scenes")

    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, Row]]:
        from stages.sources.synthetic.scenes import scene
        from stages.sources.synthetic.words import word_scene

        config = self.config
        for part in parts:
            for index in range(config.num_samples):
                named = [f"{index:09d}", f"synthetic://{config.seed}/{index:09d}.png"]
                if config.scene == "words":
                    drawn = word_scene(config.seed, index, config.split)
                    yield part, [*named, list(drawn.captions), {"transcription": drawn.word}, False]
                else:
                    yield part, [*named, list(scene(config.seed, index, config.split).captions), False]

    def prepare(self) -> None:
        load_downloader()

    def captions(self, shard: Shard) -> list[tuple[str, ...]]:
        return row_captions(cast(Sequence[UrlRow], shard.rows))

    def estimate_rows(self) -> int:
        return self.config.num_samples

    def fetch(self, shard: Shard, wanted: frozenset[str] | None, scratch: Path, emit: Emit) -> None:
        """Serves the scenes on a loopback port for as long as the shard takes, and downloads them from there."""
        from stages.sources.synthetic.server import SceneServer

        _bypass_proxy("127.0.0.1")
        rows = cast(Sequence[UrlRow], shard.rows)
        config = self.config
        with SceneServer(
            seed=config.seed,
            num_samples=config.num_samples,
            dead_indices=dead_indices(config.num_samples, config.dead_links),
            split=config.split,
            kind=config.scene,
        ) as server:
            address = {url: server.url(int(key)) for key, url, *_ in rows}
            fetch_rows(rows, wanted, scratch, config.download, emit, address=address, own=server.endpoint)

    def fingerprint(self) -> dict[str, object]:
        config = self.config
        scene = {} if config.scene == "shapes" else {"scene": config.scene}
        return {"seed": config.seed, "split": config.split, "dead_links": config.dead_links, **scene}


def _bypass_proxy(host: str) -> None:
    """Keeps this process from asking a proxy (http_proxy) for an address that only this machine knows."""
    hosts = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
    if not {"*", host} & {name.strip() for name in hosts}:
        os.environ["no_proxy"] = ",".join([*filter(None, hosts), host])


def dead_indices(num_samples: int, dead_links: int) -> frozenset[int]:
    """The scenes whose links are dead: 2, 12, 22, ..., whatever the number of scenes."""
    return frozenset(i for i in range(2, 10 * dead_links, 10) if i < num_samples)
