"""The embedded default: captioned scenes drawn by code, served over loopback HTTP and really downloaded."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from pipeline.config import Config
from pipeline.stage import Shard
from stages.sources.base import Emit, InputPart, Original, Source, SourceRow
from stages.sources.download.config import DownloadConfig
from stages.sources.download.downloader import load_downloader
from stages.sources.download.originals import download_originals


class SyntheticConfig(Config):
    """Scenes of coloured shapes with captions that describe them."""

    kind: Literal["synthetic"] = "synthetic"
    scene: Literal["shapes", "words"] = "shapes"
    """`words`: one or two coloured letters, with transcriptions, and captions that name the colours."""
    num_samples: int = Field(default=288, ge=1)
    """Scenes to make, including dead links."""
    seed: int = Field(default=0, ge=0)
    """Equal seeds make equal scenes."""
    split: Literal["train", "held_out", "all"] = "train"
    """`train` leaves out the combinations kept for evaluating a trained model."""
    dead_links: int = Field(default=1, ge=0)
    """Links that answer 404, to show what a drop looks like."""
    download: DownloadConfig = DownloadConfig()
    """How to fetch."""

    def build(self) -> "SyntheticSource":
        return SyntheticSource(self)


class SyntheticSource(Source):
    """Rows are those of a URL list; only this source can open the URLs."""

    def __init__(self, config: SyntheticConfig):
        self.config = config
        annotations = ("annotations",) if config.scene == "words" else ()
        self.layout = ("key", "url", "captions", *annotations, "is_duplicate")

    def check(self) -> None:
        return

    def parts(self) -> Iterator[InputPart]:
        yield InputPart("scenes")

    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, SourceRow]]:
        from stages.sources.synthetic.scenes import scene
        from stages.sources.synthetic.words import word_scene

        config = self.config
        for part in parts:
            for index in range(config.num_samples):
                key, url = f"{index:09d}", f"synthetic://{config.seed}/{index:09d}.png"
                if config.scene == "words":
                    words = word_scene(config.seed, index, config.split)
                    annotations = {"transcription": words.word}
                    yield part, SourceRow(key, url=url, captions=words.captions, annotations=annotations)
                else:
                    captions = scene(config.seed, index, config.split).captions
                    yield part, SourceRow(key, url=url, captions=captions)

    def prepare(self) -> None:
        load_downloader()

    def estimate_rows(self) -> int:
        return self.config.num_samples

    def fetch(self, shard: Shard, rows: Sequence[SourceRow], scratch: Path, emit: Emit) -> None:
        """Serves the scenes on a loopback port for as long as the shard takes, and downloads them from there."""
        from stages.sources.synthetic.server import SceneServer

        _bypass_proxy("127.0.0.1")
        config = self.config
        with SceneServer(
            seed=config.seed,
            num_samples=config.num_samples,
            dead_indices=dead_indices(config.num_samples, config.dead_links),
            split=config.split,
            kind=config.scene,
        ) as server:
            download_originals(
                map(Original.of, rows),
                scratch,
                config.download,
                emit,
                addresses={row.url or "": server.url(int(row.key)) for row in rows},
                own=server.endpoint,
            )

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
