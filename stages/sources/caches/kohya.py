"""Text caches of kohya-ss/sd-scripts: `NAME_flux_te.npz` and the like next to each image.

Source: `library/strategy_*.py` of sd-scripts at 48d368f (2026-02). What it computes in bfloat16 it saves as float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, Self

from pydantic import model_validator

from stages.sources.caches.base import CacheConfig, CachedText, Unusable
from stages.sources.caches.contents import missing, read_npz


@dataclass(frozen=True, slots=True)
class _Array:
    mask: str | None = None
    flag: str | None = None
    """The entry of a file that says whether its text encoder was given the mask."""


_LG, _T5 = _Array(flag="apply_lg_attn_mask"), _Array("t5_attn_mask", "apply_t5_attn_mask")
_MODELS = {
    "sdxl": ("_te_outputs.npz", dict.fromkeys(("hidden_state1", "hidden_state2", "pool2"), _Array())),
    "sd3": ("_sd3_te.npz", {"t5_out": _T5, "lg_out": _LG, "lg_pooled": _LG}),
    "flux": ("_flux_te.npz", {"t5_out": _T5, "l_pooled": _Array()}),
    "lumina": ("_lumina_te.npz", {"hidden_state": _Array("attention_mask")}),
    "hunyuan_image": ("_hi_te.npz", {"vlm_embed": _Array("vlm_mask"), "byt5_embed": _Array("byt5_mask")}),
    "anima": ("_anima_te.npz", {"prompt_embeds": _Array("attn_mask")}),
}


class KohyaCacheConfig(CacheConfig):
    """A text cache of sd-scripts (`--cache_text_encoder_outputs_to_disk`)."""

    kind: Literal["kohya"] = "kohya"
    folder: str | None = None
    """The folder of the cache, local or any fsspec URL, with the subfolders that the images have. null: its files lie
    next to the images, where sd-scripts writes them."""
    model: Literal["sdxl", "sd3", "flux", "lumina", "hunyuan_image", "anima"]
    """The model that the cache was made for; it decides the names of the files."""
    array: str
    """The array of a file: `t5_out` or `l_pooled` of flux; `t5_out`, `lg_out` or `lg_pooled` of sd3; `hidden_state1`,
    `hidden_state2` or `pool2` of sdxl; `hidden_state` of lumina; `vlm_embed` or `byt5_embed` of hunyuan_image;
    `prompt_embeds` of anima."""
    apply_attn_mask: bool = False
    """Whether the cache was made with `--apply_t5_attn_mask` (of t5_out) or `--apply_lg_attn_mask` (of lg_out and
    lg_pooled). Files that say otherwise hold other numbers, and are the drop `other_recipe`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        arrays = _MODELS[self.model][1]
        if self.array not in arrays:
            raise ValueError(f"array {self.array!r} is not in caches of {self.model}, which have {', '.join(arrays)}")
        if self.apply_attn_mask and self._array.flag is None:
            raise ValueError(f"apply_attn_mask is for t5_out, lg_out and lg_pooled, not {self.array}; leave it out")
        return self

    @property
    def _array(self) -> _Array:
        return _MODELS[self.model][1][self.array]

    def files(self, image: str, captions: Sequence[str]) -> Sequence[str]:
        del captions
        path = PurePosixPath(image)
        return [(path.parent / f"{path.stem}{_MODELS[self.model][0]}").as_posix()]

    def read(self, data: bytes, captions: Sequence[str]) -> CachedText:
        del captions
        mask, flag = self._array.mask, self._array.flag
        found = read_npz(data, [name for name in (self.array, mask, flag) if name is not None])
        for name in (self.array, mask, flag):
            if name is not None and name not in found:
                raise missing(name, found)
        if flag is not None and bool(found[flag].any()) != self.apply_attn_mask:
            made, set_to = bool(found[flag].any()), str(not self.apply_attn_mask).lower()
            raise Unusable("other_recipe", f"made with {flag}={made}; for these files set apply_attn_mask={set_to}")
        return CachedText(found[self.array], None if mask is None else found[mask])
