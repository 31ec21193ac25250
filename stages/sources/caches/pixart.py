"""Text caches of PixArt: one .npz per image with `caption_feature` and `attention_mask`.

Source: `tools/extract_features.py` of PixArt-alpha (float32, 120 tokens) and of PixArt-sigma (float16, 300).
"""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Literal

from stages.sources.caches.base import CacheConfig, CachedText
from stages.sources.caches.contents import missing, read_npz

_ARRAY, _MASK = "caption_feature", "attention_mask"


class PixartCacheConfig(CacheConfig):
    """T5 features of PixArt-alpha or PixArt-sigma."""

    kind: Literal["pixart"] = "pixart"
    folder: str
    """The folder of the .npz files (`--t5_save_root`), local or any fsspec URL."""
    model: Literal["alpha", "sigma"]
    """Which script made the cache. It decides the names: of `a/b/c.png` it is `a/b_c.npz` of alpha, and `c.npz` of
    sigma."""

    def files(self, image: str, captions: Sequence[str]) -> Sequence[str]:
        del captions
        path = PurePosixPath(image)
        flat = self.model == "sigma" or path.parent == PurePosixPath(".")
        return [f"{path.stem}.npz" if flat else f"{path.parent}_{path.stem}.npz"]

    def read(self, data: bytes, captions: Sequence[str]) -> CachedText:
        del captions
        found = read_npz(data, (_ARRAY, _MASK))
        for name in (_ARRAY, _MASK):
            if name not in found:
                raise missing(name, found)
        return CachedText(found[_ARRAY], found[_MASK])
