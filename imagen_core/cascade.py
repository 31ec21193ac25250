"""A cascade of diffusion models: a base that generates small images, and super-resolution stages.

Imagen (Saharia et al. 2022, arXiv 2205.11487, section 2.4): 64 -> 256 -> 1024 pixels. Each stage reads the
caption, and each super-resolution stage also the image of the previous stage, with a little noise on it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from imagen_core.cascade_stage import CascadeStage, SamplingConfig, sample_stage
from imagen_core.diffusion.shapes import default_shape, stage_shapes
from imagen_core.models.conditioning.base import Conditioning, unit_variance
from imagen_core.models.conditioning.characters import character_ids
from imagen_core.samplers import Inpaint, SeededNoise
from imagen_core.text_batch import EncoderRecords, TextEmbeddings, each_encoder, null_text_tensor, pad_texts

__all__ = ["Cascade", "CascadeStage", "Keep", "OnStep", "SamplingConfig"]

OnStep = Callable[[int, int, int, Tensor], None]
"""Called after each step as (stage, steps done, number of steps, image (b, c, h, w) at its noise level)."""


Keep = Callable[[int, Tensor], Tensor]
"""Called after each stage but the last as (stage, its images (b, c, h, w) in [-1, 1]) -> bool (b,): the images that
continue to the next stage."""


class Cascade:
    """Stages in the order they run; each one generates larger images than the previous one."""

    def __init__(self, stages: Sequence[CascadeStage], encoder: EncoderRecords = None):
        """`encoder` describes the text encoder all stages were trained on; None if none reads captions. A list: every
        encoder that a stage reads, if one reads several.

        Raises:
            ValueError: no stages, sizes that do not rise, or settings that do not fit a stage.
        """
        sizes = [stage.size_px for stage in stages]
        if not sizes or sorted(set(sizes)) != sizes:
            raise ValueError(f"stages: sizes must rise from stage to stage (got {sizes} pixels)")
        for stage in stages:
            stage.check()
        self.stages = list(stages)
        self.encoder = encoder

    @property
    def sizes_px(self) -> list[int]:
        return [stage.size_px for stage in self.stages]

    def shapes(self, first: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width of the images of each stage, from those of the first.

        Raises:
            ValueError: a side is no whole number of pixels in a stage, or one that its network cannot halve.
        """
        return stage_shapes([stage.config for stage in self.stages], first)

    @property
    def max_characters(self) -> int | None:
        """Most bytes of a transcription that every stage that reads them can read; None if no stage does."""
        return min((stage.max_characters for stage in self.stages if stage.max_characters is not None), default=None)

    @property
    def num_classes(self) -> int | None:
        """Classes that every stage that reads labels knows; None if no stage does."""
        return min((stage.num_classes for stage in self.stages if stage.num_classes is not None), default=None)

    @torch.no_grad()
    def sample(
        self,
        text: TextEmbeddings | None,
        seeds: Sequence[int],
        *,
        null_text: np.ndarray | Tensor | None = None,
        text_embed: Tensor | None = None,
        image_embed: Tensor | None = None,
        transcriptions: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        condition_images: Mapping[str, Tensor] | None = None,
        low_res: Tensor | None = None,
        shape: tuple[int, int] | None = None,
        start_stage: int = 0,
        stop_stage: int | None = None,
        init_image: Tensor | None = None,
        strength: float = 1.0,
        encode_init: bool = False,
        inpaint: Inpaint | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        autocast: torch.dtype | None = None,
        on_step: OnStep | None = None,
        keep: Keep | None = None,
    ) -> dict[int, Tensor]:
        """Samples one image per seed. An image depends on its own seed and caption alone, not on its batch.

        Args:
            text: one (num_tokens, dim) or (num_tokens, layers, dim) array per image, as the encoder's record says;
                where the cascade has several encoders, such arrays of each by its name. None samples without captions.
            null_text: (num_tokens, dim) or (num_tokens, layers, dim), takes the place of dropped captions in guidance:
                a negative prompt, or the empty caption, which stages with dropped_caption=empty_caption need.
            text_embed: (b, dim), the captions as one vector each, for stages that read them. Only their direction
                counts.
            image_embed: (b, dim), embeddings of the images to generate, for stages that read them: generated by a
                prior, or computed from existing images. Only their direction counts.
            transcriptions: the text to be written in each image; None, or an empty text, means no text.
            labels: the class of each image, from 0; -1 means unknown. None means that all are unknown.
            condition_images: (b, c, H, W) in [-1, 1] by name, further images for stages that read them, stretched
                to the shape of each stage.
            low_res: (b, 3, h, w) in [-1, 1], given to the first stage that runs in place of the image
                of the previous stage: super-resolution of an existing image.
            shape: height and width of the images of the first stage that runs; those of the others are this shape,
                scaled. None means squares; if low_res is not square, its shape times the factor of the stage.
            start_stage, stop_stage: the first stage to run, and the one before which to stop (as in a slice).
            init_image: (b, 3, H, W) in [-1, 1]; the first stage that runs starts from it instead of pure
                noise (SDEdit, Meng et al. 2022, arXiv 2108.01073).
            strength: in [0, 1], how much of the way init_image is sent back into noise.
            encode_init: this noise is what the first stage itself would generate init_image from without conditions
                (`encode`), instead of sampled noise; the same image for every seed. For samplers that add no noise.
            inpaint: image and mask of the part to keep, in any size; each stage keeps it. They are stretched to the
                shape of the stage, as init_image is.
            autocast: type for the network, e.g. torch.bfloat16; the sampler stays in `dtype`.
            keep: chooses after each stage which images the next one super-resolves; when none is left, the other
                stages do not run.
        Returns:
            Images of every stage that ran by size in pixels, (b, 3, h, w) in [-1, 1]; with `keep` fewer
            from stage to stage, in the same order.
        Raises:
            ValueError: inputs that do not fit the stages.
        """
        stages = self.stages[start_stage:stop_stage]
        if not stages:
            raise ValueError(f"no stage to run: start {start_stage}, stop {stop_stage} of {len(self.stages)}")
        if stages[0].is_super_resolution and low_res is None:
            raise ValueError(
                f"stage {start_stage} ({stages[0].size_px} px) needs a low-resolution image: give low_res, "
                "or start at a base stage"
            )
        if shape is None:
            shape = default_shape(stages[0].config, None if low_res is None else low_res.shape[-2:])
        shapes = stage_shapes([stage.config for stage in stages], shape)
        _check_embeds(stages, text_embed, image_embed, len(seeds))
        conditioning = self._conditioning(text, text_embed, image_embed, transcriptions, labels, len(seeds))
        if null_text is None and any(each.config.unet.needs_empty_caption for each in stages):
            raise ValueError('null_text: the stages need the encoding of "", or of a negative prompt')
        if null_text is not None:
            conditioning = conditioning.with_null_text(null_text_tensor(null_text, self.encoder))
            conditioning = conditioning if text is not None else conditioning.unconditional()
        conditioning = conditioning.to(device, dtype)
        current = None if low_res is None else low_res.to(device, dtype)
        start = None if init_image is None else init_image.to(device, dtype)
        further = {name: image.to(device, dtype) for name, image in (condition_images or {}).items()}
        images: dict[int, Tensor] = {}
        kept, last = list(seeds), start_stage + len(stages) - 1
        for number, stage in enumerate(stages, start_stage):
            models = [each for each in (stage.denoiser, stage.guide) if each is not None]
            for model in models:
                model.to(device=device, dtype=dtype).eval()
            with torch.autocast(torch.device(device).type, autocast, enabled=autocast is not None):
                current = sample_stage(
                    stage,
                    shapes[number - start_stage],
                    self._read_by(stage, conditioning),
                    SeededNoise(kept, stream=number),
                    further=further,
                    low_res=current if stage.is_super_resolution else None,
                    init_image=start if number == start_stage else None,
                    strength=strength,
                    encode_init=encode_init,
                    inpaint=inpaint,
                    on_step=None if on_step is None else partial(on_step, number),
                )
            for model in models:
                model.to("cpu")  # the next stage needs the room
            images[stage.size_px] = current.clamp(-1, 1)
            if keep is not None and number < last:
                rows = _kept_rows(keep(number, images[stage.size_px]), len(kept)).to(current.device)
                kept = [seed for seed, is_kept in zip(kept, rows.tolist(), strict=True) if is_kept]
                if not kept:
                    break
                current, conditioning = current[rows], conditioning.map(lambda t, rows=rows: t[rows])
                inpaint = None if inpaint is None else inpaint.rows(rows)
                further = {name: image[rows] for name, image in further.items()}
        return images

    def _conditioning(
        self,
        text: TextEmbeddings | None,
        text_embed: Tensor | None,
        image_embed: Tensor | None,
        transcriptions: Sequence[str] | None,
        labels: Sequence[int] | None,
        batch: int,
    ) -> Conditioning:
        """All conditions but the low-resolution image, on the CPU."""
        embeddings, mask = pad_texts(text, batch, self.encoder)
        return Conditioning(
            text=embeddings,
            text_mask=mask,
            text_embed=None if text_embed is None else unit_variance(text_embed),
            characters=self._characters(transcriptions, batch),
            labels=self._labels(labels, batch),
            image_embed=None if image_embed is None else unit_variance(image_embed),
        )

    def _read_by(self, stage: CascadeStage, conditioning: Conditioning) -> Conditioning:
        """The conditions with the tokens of the encoders that a stage reads, where the cascade has several."""
        text, mask = conditioning.text, conditioning.text_mask
        dims = stage.config.unet.text_dim
        if not isinstance(text, tuple) or not isinstance(mask, tuple) or dims is None:
            return conditioning
        names = [encoder["name"] for encoder in each_encoder(self.encoder)]
        at = [names.index(name) for name in (names if stage.encoders is None else stage.encoders)]
        if isinstance(dims, tuple):
            return replace(conditioning, text=tuple(text[k] for k in at), text_mask=tuple(mask[k] for k in at))
        return replace(conditioning, text=text[at[0]], text_mask=mask[at[0]])

    def _characters(self, transcriptions: Sequence[str] | None, batch: int) -> Tensor | None:
        if self.max_characters is None:
            if transcriptions is not None:
                raise ValueError("transcriptions: no stage reads them; leave them out")
            return None
        if transcriptions is None:
            transcriptions = [""] * batch
        if len(transcriptions) != batch:
            raise ValueError(f"transcriptions: {len(transcriptions)} for {batch} images; give one per image")
        return character_ids(transcriptions, self.max_characters)

    def _labels(self, labels: Sequence[int] | None, batch: int) -> Tensor | None:
        if self.num_classes is None:
            if labels is not None:
                raise ValueError("labels: no stage reads them; leave them out")
            return None
        if labels is None:
            labels = [-1] * batch
        if len(labels) != batch:
            raise ValueError(f"labels: {len(labels)} for {batch} images; give one per image")
        if wrong := [label for label in labels if not -1 <= label < self.num_classes]:
            raise ValueError(f"labels: {wrong[0]} is none of 0 to {self.num_classes - 1}, nor -1 for an unknown class")
        return torch.tensor(list(labels), dtype=torch.long)


def _kept_rows(rows: Tensor, count: int) -> Tensor:
    """The answer of `keep`; ValueError unless it is bool (count,)."""
    if rows.shape != (count,) or rows.dtype != torch.bool:
        raise ValueError(f"keep: give one bool for each of {count} images (got {rows.dtype} {tuple(rows.shape)})")
    return rows


def _check_embeds(
    stages: Sequence[CascadeStage], text_embed: Tensor | None, image_embed: Tensor | None, count: int
) -> None:
    """Refuses missing embeddings, and embeddings of another width or number."""
    for stage in stages:
        for name, of, dim, embed, remedy in (
            ("text_embed", "captions' vectors", stage.text_embed_dim, text_embed, "give one for each caption"),
            ("image_embed", "image embeddings", stage.image_embed_dim, image_embed, "generate them with a prior"),
        ):
            if dim is not None and (embed is None or tuple(embed.shape) != (count, dim)):
                found = None if embed is None else tuple(embed.shape)
                raise ValueError(
                    f"{name}: the {stage.size_px} px stage reads {of} ({count}, {dim}) (got {found}); {remedy}"
                )
