"""A cascade of diffusion models: a base that generates small images, and super-resolution stages.

Copied by `pipeline export --to diffusers` (https://pypi.org/project/imagen-precompute) into the folder of a cascade,
whose README.md says how to use it. Needs torch, diffusers, and transformers to encode prompts.
"""

import secrets
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .cascade_sampling import Noise, Texts, sample_stage, stage_seed


class CascadePipeline(DiffusionPipeline):
    """Text to image by up to four stages, each with larger images than the one before."""

    model_cpu_offload_seq = "text_encoder->stage_1->stage_2->stage_3->stage_4"
    text_encoder: Any
    tokenizer: Any
    _optional_components = ["stage_2", "stage_3", "stage_4", "text_encoder", "tokenizer"]  # noqa: RUF012

    def __init__(
        self,
        stage_1,  # components have no types: diffusers would compare these with what it loads
        stage_2=None,
        stage_3=None,
        stage_4=None,
        text_encoder=None,
        tokenizer=None,
        encoder_model: str | None = None,
        encoder_revision: str | None = None,
        max_tokens: int = 128,
        embedding_dtype: str | None = None,
        empty_caption: bool = False,
    ):
        """
        Args:
            encoder_model, encoder_revision: the text encoder on the hub, if the folder has none; it is loaded when
                the first prompt is encoded.
            max_tokens: longer prompts are truncated.
            embedding_dtype: type that the embeddings are rounded to, as those of training were.
            empty_caption: whether a dropped caption is the empty one; otherwise the networks know what it is.
        """
        super().__init__()
        self.register_modules(
            stage_1=stage_1,
            stage_2=stage_2,
            stage_3=stage_3,
            stage_4=stage_4,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(
            encoder_model=encoder_model,
            encoder_revision=encoder_revision,
            max_tokens=max_tokens,
            embedding_dtype=embedding_dtype,
            empty_caption=empty_caption,
        )
        self.processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def stages(self) -> list[Any]:
        """The networks, smallest images first."""
        found = (self.stage_1, self.stage_2, self.stage_3, self.stage_4)
        return [stage for stage in found if stage is not None]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        prompt_embeds: Tensor | Sequence[Tensor] | None = None,
        prompt_mask: Tensor | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_embeds: Tensor | Sequence[Tensor] | None = None,
        labels: Sequence[int] | None = None,
        image: Any = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generates images.

        Args:
            prompt: one prompt or several.
            prompt_embeds: instead of prompts their embeddings, float (b, l, dim) with `prompt_mask`, bool (b, l), or
                one (l, dim) for each.
            negative_prompt: what guidance leads away from, one for all prompts or one for each; None means a dropped
                caption as in training.
            negative_prompt_embeds: instead of negative prompts their embeddings.
            labels: the class of each prompt, for a cascade that reads classes; -1 means unknown.
            image: the images to super-resolve, if the first stage does that: PIL images, or float (b, 3, h, w) in
                [-1, 1].
            guidance_scale: weight of the prompt in all stages; None means that of each stage.
            height, width: of the last stage's images, in pixels.
            seed: of the first image, the next ones having the next seeds; or one for each image.
            generator: instead of a seed, one generator or one for each image.
            output_type: pil, np or pt; these have images in [0, 1].
        Raises:
            ValueError: inputs that do not fit the cascade.
        """
        device = self._execution_device
        copies, scale = num_images_per_prompt, guidance_scale
        texts, count = self._texts(prompt, prompt_embeds, prompt_mask, [labels, image])
        texts |= self._null_texts(texts, negative_prompt, negative_prompt_embeds, scale)
        texts = {name: each.repeat_interleave(copies, dim=0) for name, each in texts.items()}
        shapes = self._shapes(height, width)
        classes = None if labels is None else torch.tensor(list(labels), device=device).repeat_interleave(copies)
        current = self._low_res(image, shapes[0], copies)
        noises = self._noises(seed, generator, count * copies)
        total = sum("estimate" in entry for stage in self.stages for entry in stage.config.sampling["table"])
        with self.progress_bar(total=total) as bar:  # type: ignore[call-arg]
            for stage, shape, noise in zip(self.stages, shapes, noises, strict=True):
                current = sample_stage(stage, shape, texts, classes, current, noise, scale, device, bar.update)
        assert current is not None
        images: Any = self.processor.postprocess(current.clamp(-1, 1).cpu(), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def encode_prompt(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> float32 (b, l, dim), zero in padding, and bool (b, l), true on tokens."""
        if any(part is None for part in (self.text_encoder, self.tokenizer)):
            self._load_encoder()
        device, tokenizer, encoder = self._execution_device, self.tokenizer, self.text_encoder
        words = ["".join(" " if unicodedata.category(c) == "Cc" else c for c in prompt).strip() for prompt in prompts]
        limit = self.config["max_tokens"]
        tokens = tokenizer(words, truncation=True, max_length=limit, padding=True, return_tensors="pt")
        ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        if self.config["embedding_dtype"] is not None:
            states = states.to(getattr(torch, self.config["embedding_dtype"])).float()
        return states * mask[..., None], mask.bool()

    def _load_encoder(self) -> None:
        model = self.config["encoder_model"]
        if model is None:
            raise ValueError("this folder has no text encoder (see its README.md): give prompt_embeds")
        from transformers import AutoModelForTextEncoding, AutoTokenizer

        revision = self.config["encoder_revision"]
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
        encoder: Any = AutoModelForTextEncoding.from_pretrained(model, revision=revision)
        self.register_modules(text_encoder=encoder.eval().to(self._execution_device), tokenizer=tokenizer)

    def _texts(
        self,
        prompt: str | Sequence[str] | None,
        embeds: Tensor | Sequence[Tensor] | None,
        mask: Tensor | None,
        others: Sequence[Any],
    ) -> tuple[Texts, int]:
        """The captions, none if the cascade reads none; and the number of prompts, or of what else is given."""
        numbers = [len(given) for given in others if isinstance(given, Sequence | Tensor)]
        if any("text" in stage.config.sampling["conditions"] for stage in self.stages):
            if (prompt is None) == (embeds is None):
                raise ValueError("give either prompt or prompt_embeds")
            text, mask = self._embedded(prompt, embeds, mask)
            texts, count = {"text": text, "text_mask": mask}, len(text)
        elif prompt is None and embeds is None:
            texts, count = {}, (*numbers, 1)[0]
        else:
            raise ValueError("prompt: this cascade reads no captions; leave it out")
        if any(number != count for number in numbers):
            raise ValueError(f"labels, image: give one for each of {count} prompts")
        return texts, count

    def _embedded(
        self, prompt: str | Sequence[str] | None, embeds: Tensor | Sequence[Tensor] | None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Prompts or their embeddings -> float32 (b, l, dim) and bool (b, l)."""
        if prompt is not None:
            return self.encode_prompt([prompt] if isinstance(prompt, str) else list(prompt))
        assert embeds is not None
        if not isinstance(embeds, Tensor):
            mask = pad_sequence([torch.ones(len(row)) for row in embeds], batch_first=True)
            embeds = pad_sequence([row.float() for row in embeds], batch_first=True)
        mask = torch.ones(embeds.shape[:2]) if mask is None else mask
        return embeds.to(self._execution_device, torch.float32), mask.to(self._execution_device, torch.bool)

    def _null_texts(
        self,
        texts: Texts,
        prompt: str | Sequence[str] | None,
        embeds: Tensor | Sequence[Tensor] | None,
        guidance_scale: float | None,
    ) -> Texts:
        """What takes the place of dropped captions, if the networks do not know it; both in one length."""
        weights = [stage.config.sampling["guidance"]["text"] for stage in self.stages]
        guided = any(weight != 1 for weight in weights) if guidance_scale is None else guidance_scale != 1
        if prompt is None and embeds is None:
            if not texts or not guided or not self.config["empty_caption"]:
                return {}
            if self.text_encoder is None and self.config["encoder_model"] is None:
                raise ValueError("negative_prompt_embeds: give the embedding of the empty prompt, or guidance_scale=1")
            prompt = ""
        if not texts:
            raise ValueError("negative_prompt: this cascade reads no captions; leave it out")
        null, mask = self._embedded(prompt, embeds)
        if len(null) not in (1, len(texts["text"])):
            raise ValueError(
                f"negative_prompt: {len(null)} for {len(texts['text'])} prompts; give one for all or each"
            )
        found = texts | {"null_text": null, "null_text_mask": mask}
        longest = max(each.shape[1] for each in found.values())
        for name, each in found.items():
            padding = each.new_zeros(len(each), longest - each.shape[1], *each.shape[2:])
            found[name] = torch.cat([each, padding], dim=1).expand(len(texts["text"]), *[-1] * (each.ndim - 1))
        return found

    def _shapes(self, height: int | None, width: int | None) -> list[tuple[int, int]]:
        """Height and width of each stage's images."""
        settings = [stage.config.sampling for stage in self.stages]
        last = settings[-1]["size_px"]
        shapes: list[tuple[int, int]] = []
        for each in settings:
            sides = [Fraction((side or last) * each["size_px"], last) for side in (height, width)]
            if any(side.denominator != 1 or side % each["divisor"] for side in sides):
                raise ValueError(
                    f"height, width: {height} x {width} are {float(sides[0]):g} x {float(sides[1]):g} px in the stage "
                    f"of {each['size_px']} px, which needs multiples of {each['divisor']} px"
                )
            shapes.append((int(sides[0]), int(sides[1])))
        return shapes

    def _low_res(self, image: Any, shape: tuple[int, int], copies: int) -> Tensor | None:
        """The images that the first stage super-resolves: float (b, 3, h, w) in [-1, 1]."""
        settings = self.stages[0].config.sampling
        if (image is None) != (settings["low_res"] is None):
            wanted = "super-resolves images: give image" if image is None else "generates images: leave image out"
            raise ValueError(f"image: the first stage {wanted}")
        if image is None:
            return None
        if not isinstance(image, Tensor):
            factor = Fraction(settings["low_res"]["size_px"], settings["size_px"])
            height, width = (int(side * factor) for side in shape)
            image = self.processor.preprocess(image, height=height, width=width)
        return image.to(self._execution_device, torch.float32).repeat_interleave(copies, dim=0)

    def _noises(
        self,
        seed: int | Sequence[int] | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        count: int,
    ) -> list[Noise]:
        """The noise of each stage."""
        if generator is not None:
            given = [generator] * count if isinstance(generator, torch.Generator) else list(generator)
            seeds: list[int] = []
        else:
            first = secrets.randbelow(2**32) if seed is None else seed
            seeds = [first + index for index in range(count)] if isinstance(first, int) else list(first)
            given = seeds
        if len(given) != count:
            raise ValueError(f"seed, generator: {len(given)} for {count} images; give one for each")
        if generator is not None:
            return [Noise(given)] * len(self.stages)  # type: ignore[arg-type]
        return [
            Noise([torch.Generator().manual_seed(stage_seed(seed, number)) for seed in seeds])
            for number in range(len(self.stages))
        ]
