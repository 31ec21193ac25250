"""Text caches of kohya-ss/musubi-tuner: `NAME_ARCHITECTURE_te.safetensors`, whose metadata has the caption.

A key is the array's name and torch's name of its dtype, `t5_vec_bfloat16`; in front `varlen_` where the padding was
left out. Source: `dataset/cache_io.py` and `dataset/architectures.py` of musubi-tuner at 30c658c (2026).
"""

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from stages.captions import clean_caption
from stages.sources.caches.base import CacheConfig, CachedText, Unusable, beside
from stages.sources.caches.contents import missing, read_safetensors

_MASKS = {"llm": "llm_mask", "llama_vec": "llama_attention_mask", "text_embeds": "attention_mask"}
_CAPTION = "caption1"
_DTYPE = r"(?:float64|float32|float16|bfloat16|float8_e4m3fn|float8_e5m2)"


class MusubiCacheConfig(CacheConfig):
    """A text cache of musubi-tuner."""

    kind: Literal["musubi"] = "musubi"
    folder: str | None = None
    """The folder of the cache (`cache_directory`), local or any fsspec URL. null: its files lie next to the images."""
    architecture: str = Field(pattern=r"^[a-z0-9]+$")
    """How the names of its files end: `fk` of NAME_fk_te.safetensors (FLUX Kontext), `qi` (Qwen-Image), `f2d`
    (FLUX.2), `zi` (Z-Image), `wan`, `hv`, `k5` and others."""
    array: str
    """The array of a file, without dtype and `varlen_`: `t5_vec` or `clip_l_pooler` of fk, `vl_embed` of qi, `ctx_vec`
    of FLUX.2, `llm_embed` of zi, `t5` of wan, `llm` or `clipL` of hv, `text_embeds` or `pooled_embed` of k5."""

    def files(self, image: str, captions: Sequence[str]) -> Sequence[str]:
        del captions
        return [beside(image, self.folder, f"_{self.architecture}_te.safetensors")]

    def read(self, data: bytes, captions: Sequence[str]) -> CachedText:
        content = read_safetensors(data)
        made_of = content.metadata.get(_CAPTION)
        if made_of is not None and clean_caption(made_of) not in captions:
            raise Unusable("other_caption", f"made of {made_of!r}"[:200])
        named = re.compile(rf"(?:varlen_)?{re.escape(self.array)}_{_DTYPE}")
        keys = [key for key in content.tensors if named.fullmatch(key)]
        if not keys:
            raise missing(self.array, content.tensors)
        if len(keys) > 1:
            raise Unusable("ambiguous_embedding", f"it has {' and '.join(sorted(keys))}")
        mask = _MASKS.get(self.array)
        if mask is not None and mask not in content.tensors:
            raise missing(mask, content.tensors)
        return CachedText(content.array(keys[0]), None if mask is None else content.array(mask))
