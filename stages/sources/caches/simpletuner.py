"""Text caches of SimpleTuner: `MD5-MODEL.pt`, a dict of tensors, where MD5 is that of the caption.

Source: `simpletuner/helpers/caching/text_embeds.py` of SimpleTuner (2026).
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from stages.captions import clean_caption
from stages.sources.caches.base import CacheConfig, CachedText
from stages.sources.caches.contents import missing, read_torch

_EMBEDDINGS = "prompt_embeds"
_MASKS = ("attention_mask", "attention_masks", "prompt_attention_mask")


class SimpletunerCacheConfig(CacheConfig):
    """A text cache of SimpleTuner whose names are made of captions (not of files, as edit models have it)."""

    kind: Literal["simpletuner"] = "simpletuner"
    folder: str
    """The folder of the .pt files (`cache_dir` of the text embeds), local or any fsspec URL."""
    model: str = Field(pattern=r"^[\w.-]+$")
    """The type of model in the names of the files: `flux` of MD5-flux.pt."""
    array: str = _EMBEDDINGS
    """The tensor of a file: `prompt_embeds`, or `pooled_prompt_embeds`."""

    def files(self, image: str, captions: Sequence[str]) -> Sequence[str]:
        del image
        spelled = dict.fromkeys(each for caption in captions[:1] for each in (caption, clean_caption(caption)))
        return [f"{_md5(caption)}-{self.model}.pt" for caption in spelled]

    def read(self, data: bytes, captions: Sequence[str]) -> CachedText:
        del captions
        found = read_torch(data)
        if self.array not in found:
            raise missing(self.array, found)
        masks = [found[name] for name in _MASKS if name in found] if self.array == _EMBEDDINGS else []
        return CachedText(found[self.array], masks[0] if masks else None)


def _md5(caption: str) -> str:
    return hashlib.md5(caption.encode("utf-8", "surrogateescape"), usedforsecurity=False).hexdigest()
