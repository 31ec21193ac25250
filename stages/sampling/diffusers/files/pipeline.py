"""A cascade of diffusion models: a base that generates small images, and super-resolution stages.

Copied by `pipeline export --to diffusers` (https://pypi.org/project/imagen-precompute) into the folder of a cascade,
whose README.md says how to use it. Needs torch, diffusers, and transformers to encode prompts.

Noise levels follow Karras et al. 2022 (arXiv 2206.00364): x = x0 + sigma * noise, with images x0 in [-1, 1].
"""

import hashlib
import secrets
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

Estimate = Callable[[Tensor, float, bool], tuple[Tensor, Tensor | None]]
"""(x, sigma, whether guided) -> the estimate of x0, and the channels of a learned variance."""


class Noise:
    """Standard normal numbers from one generator for each image, so that an image does not depend on its batch."""

    def __init__(self, generators: Sequence[torch.Generator]):
        self.generators = generators

    def normal(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """float32 (b, *shape)."""
        rows = [
            torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device=generator.device).cpu()
            for generator in self.generators
        ]
        return torch.stack(rows).to(device, torch.float32)


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
    ):
        """
        Args:
            encoder_model, encoder_revision: the text encoder on the hub, if the folder has none; it is loaded when
                the first prompt is encoded.
            max_tokens: longer prompts are truncated.
            embedding_dtype: type that the embeddings are rounded to, as those of training were.
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
        text, mask, count = self._texts(prompt, prompt_embeds, prompt_mask, labels, image, num_images_per_prompt)
        shapes = self._shapes(height, width)
        classes = None if labels is None else torch.tensor(list(labels)).repeat_interleave(num_images_per_prompt)
        low_res = self._low_res(image, shapes[0], num_images_per_prompt)
        noises = self._noises(seed, generator, count)
        total = sum("estimate" in entry for stage in self.stages for entry in stage.config.sampling["table"])
        current = low_res
        with self.progress_bar(total=total) as bar:  # type: ignore[call-arg]
            for stage, shape, noise in zip(self.stages, shapes, noises, strict=True):
                settings = stage.config.sampling
                start = None if settings["low_res"] is None else current
                inputs = _inputs(settings, text, mask, classes, start, shape, noise, device)
                estimate = _guided(stage, settings, inputs, guidance_scale, bar.update)
                current = follow(settings, estimate, noise, (settings["channels"], *shape), device)
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
        labels: Sequence[int] | None,
        image: Any,
        copies: int,
    ) -> tuple[Tensor | None, Tensor | None, int]:
        """Embeddings and mask of each image, if the cascade reads captions; and the number of images."""
        others = [len(given) for given in (labels, image) if isinstance(given, Sequence | Tensor)]
        if not any("text" in stage.config.sampling["conditions"] for stage in self.stages):
            if prompt is not None or embeds is not None:
                raise ValueError("prompt: this cascade reads no captions; leave it out")
            return None, None, copies * (others or [1])[0]
        if (prompt is None) == (embeds is None):
            raise ValueError("give either prompt or prompt_embeds")
        if embeds is None:
            assert prompt is not None
            embeds, mask = self.encode_prompt([prompt] if isinstance(prompt, str) else list(prompt))
        elif not isinstance(embeds, Tensor):
            rows = list(embeds)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True).bool()
            embeds = torch.nn.utils.rnn.pad_sequence([row.float() for row in rows], batch_first=True)
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        if any(number != len(embeds) for number in others):
            raise ValueError(f"labels, image: give one for each of {len(embeds)} prompts")
        text, mask = (each.to(self._execution_device).repeat_interleave(copies, dim=0) for each in (embeds, mask))
        return text.float(), mask, len(text)

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
            Noise([torch.Generator().manual_seed(_mix(seed, number)) for seed in seeds])
            for number in range(len(self.stages))
        ]


def follow(
    settings: Mapping[str, Any], estimate: Estimate, noise: Noise, shape: Sequence[int], device: torch.device
) -> Tensor:
    """Follows the table of a stage's sampler: float32 (b, *shape).

    An entry takes noise, or adds up named images, each times a number; the sum is an image, or what the network gets.
    The term `noise` of an entry `variance` is also multiplied by exp(log_ratio * v), where v are the variance's
    channels of an estimate.
    """
    table = settings["table"]
    values: dict[str, Tensor] = {}
    variances: dict[str, Tensor | None] = {}
    last_use = {name: index for index, entry in enumerate(table) for name in entry.get("of", ())}
    result = torch.zeros(())
    for index, entry in enumerate(table):
        if "noise" in entry:
            values[entry["noise"]] = noise.normal(shape, device)
            continue
        factors: dict[str, Any] = dict(entry["of"])
        varied = entry.get("variance")
        if varied is not None:
            channels = variances[varied["channels"]]
            assert channels is not None
            share = channels.sigmoid() if settings["sigmoid"] else channels
            factors[varied["noise"]] = factors[varied["noise"]] * (varied["log_ratio"] * share).exp()
        result = sum((factor * values[name] for name, factor in factors.items()), torch.zeros((), device=device))
        if "estimate" in entry:
            name = entry["estimate"]
            values[name], channels = estimate(result, entry["sigma"], entry["guided"])
            variances = {name: channels}
        else:
            values[entry["image"]] = result
        values = {name: value for name, value in values.items() if last_use.get(name, -1) > index}
    return result


def _inputs(
    settings: Mapping[str, Any],
    text: Tensor | None,
    mask: Tensor | None,
    labels: Tensor | None,
    low_res: Tensor | None,
    shape: tuple[int, int],
    noise: Noise,
    device: torch.device,
) -> dict[str, Tensor]:
    """What the network of a stage reads beside the noisy image, but for which of it is kept."""
    inputs: dict[str, Tensor] = {}
    if "text" in settings["conditions"]:
        assert text is not None
        assert mask is not None
        if list(text.shape[2:]) != settings["text_shape"]:
            raise ValueError(
                f"prompt_embeds: {list(text.shape[2:])} wide, this cascade reads {settings['text_shape']}"
            )
        tokens = slice(settings["max_tokens"])
        inputs |= {"text": text[:, tokens], "text_mask": mask[:, tokens]}
    if "labels" in settings["conditions"]:
        unknown = torch.full((len(noise.generators),), -1)
        inputs["labels"] = (unknown if labels is None else labels).to(device)
    if low_res is not None:
        image_noise = noise.normal((settings["channels"], *shape), device)
        inputs["low_res"] = _noised(settings["low_res"], low_res, image_noise)
        inputs["low_res_noise"] = torch.full((len(low_res),), float(settings["low_res"]["c_noise"]), device=device)
    return inputs


def _noised(settings: Mapping[str, Any], low_res: Tensor, noise: Tensor) -> Tensor:
    """The low-resolution image in the size of `noise`, scale * (image + sigma * noise)."""
    shape, sigma, scale = (noise.shape[-2], noise.shape[-1]), settings["sigma"], settings["scale"]
    if settings["noise_first"]:
        noise = noise[..., : low_res.shape[-2], : low_res.shape[-1]]
        return _upsample(scale * (low_res + sigma * noise), shape, settings["upsampling"])
    upsampled = _upsample(low_res, shape, settings["upsampling"])
    return upsampled if sigma is None else scale * (upsampled + sigma * noise)


def _upsample(image: Tensor, shape: tuple[int, int], mode: str) -> Tensor:
    if image.shape[-2:] == shape:
        return image
    if mode == "cubic_reflect":
        return _cubic_reflect(image, shape)
    if mode == "nearest":
        return F.interpolate(image, size=shape, mode="nearest-exact").clamp(-1, 1)
    smaller = image.shape[-1] > shape[-1]
    if mode == "bicubic_unclipped":
        return F.interpolate(image, size=shape, mode="bicubic", antialias=smaller)
    return F.interpolate(image, size=shape, mode=mode, antialias=smaller).clamp(-1, 1)


def _cubic_reflect(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """Bicubic upsampling by a whole factor, of the image reflected at its edges."""
    height, width = image.shape[-2:]
    factor, margin = shape[1] // width, min(3, width - 1, height - 1)
    padded = F.pad(image, (margin,) * 4, mode="reflect")
    rows, columns = (slice(factor * margin, factor * (margin + side)) for side in (height, width))
    size = (factor * (height + 2 * margin), factor * (width + 2 * margin))
    return F.interpolate(padded, size, mode="bicubic", antialias=True)[..., rows, columns].clamp(-1, 1)


def _guided(
    network: Any,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Tensor],
    scale: float | None,
    count: Callable[[], object],
) -> Estimate:
    """The network with classifier-free guidance and threshold."""
    weights = settings["guidance"] | ({} if scale is None else {"text": scale})
    guided, plain = _terms(settings["conditions"], weights), [(1.0, frozenset[str]())]

    def estimate(x: Tensor, sigma: float, is_guided: bool) -> tuple[Tensor, Tensor | None]:
        total, variance = torch.zeros_like(x), None
        level = torch.full((len(x),), sigma, device=x.device)
        for index, (weight, dropped) in enumerate(guided if is_guided else plain):
            given = dict(inputs)
            for name in ("text", "labels"):
                given[f"{name}_keep"] = torch.full((len(x),), name not in dropped, device=x.device)
            if "low_res" in dropped:
                given["low_res"] = torch.zeros_like(given["low_res"])
            found, channels = network(x, level, **given)
            total, variance = total + weight * found, channels if index == 0 else variance
        count()
        return _threshold(total, settings["threshold"]), variance

    return estimate


def _terms(conditions: Sequence[str], weights: Mapping[str, float]) -> list[tuple[float, frozenset[str]]]:
    """Weight and dropped conditions of each estimate: D_none + sum of w_i (D_with_i - D_without_i)."""
    terms: list[tuple[float, frozenset[str]]] = []
    dropped, before = frozenset[str](), 0.0
    for condition in conditions:
        terms.append((weights[condition] - before, dropped))
        dropped, before = dropped | {condition}, weights[condition]
    terms.append((1 - before, dropped))
    return [(weight, without) for weight, without in terms if weight != 0]


def _threshold(x0: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Clips an estimate: to [-1, 1], or dynamically (Saharia et al. 2022, arXiv 2205.11487, section 2.3)."""
    if settings["kind"] == "none":
        return x0
    if settings["kind"] == "static":
        return x0.clamp(-1, 1)
    limit = torch.quantile(x0.abs().flatten(1), settings["percentile"], dim=1).clamp(min=1, max=settings["cap"])
    limit = limit[:, None, None, None]
    return x0.clamp(-limit, limit) / limit


def _mix(seed: int, stage: int) -> int:
    """The seed of one stage's generator."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stage}".encode()).digest()[:8], "big") >> 1
