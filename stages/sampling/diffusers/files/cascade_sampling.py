"""How one stage of an exported cascade samples: its table of sums, guidance, threshold and low-resolution image.

Copied by `pipeline export --to diffusers` next to pipeline.py. Noise levels follow Karras et al. 2022 (arXiv
2206.00364): x = x0 + sigma * noise, with images x0 in [-1, 1].
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Estimate = Callable[[Tensor, float, bool], tuple[Tensor, Tensor, Tensor | None]]
"""(x, sigma, whether guided) -> the estimate of x0, before and after the threshold, and the channels of a learned
variance."""
Texts = dict[str, Tensor]
"""`text` (b, l, dim) and `text_mask` (b, l); with `null_` in front what takes the place of a dropped caption."""


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


def sample_stage(
    network: Any,
    shape: tuple[int, int],
    texts: Texts,
    labels: Tensor | None,
    before: Tensor | None,
    noise: Noise,
    scale: float | None,
    device: torch.device,
    count: Callable[[], object],
) -> Tensor:
    """The images of one stage, float32 (b, c, *shape), about in [-1, 1].

    Args:
        labels: int64 (b,), -1 where unknown; None if all are.
        before: (b, c, h, w), the images of the previous stage; read by a stage that super-resolves.
        scale: weight of the prompt; None means the stage's own.
        count: called after each estimate.
    """
    settings = network.config.sampling
    low_res = None if settings["low_res"] is None else before
    inputs = _inputs(settings, texts, labels, low_res, shape, noise, device)
    estimate = _guided(network, settings, inputs, scale, count)
    return _follow(settings, estimate, noise, (settings["channels"], *shape), device)


def _follow(
    settings: Mapping[str, Any], estimate: Estimate, noise: Noise, shape: Sequence[int], device: torch.device
) -> Tensor:
    """Follows the table of a stage's sampler: float32 (b, *shape).

    An entry takes noise, or adds up named images, each times a number; the sum is an image, or what the network gets;
    `unclipped` names its estimate before the threshold.
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
            before, values[name], channels = estimate(result, entry["sigma"], entry["guided"])
            if "unclipped" in entry:
                values[entry["unclipped"]] = before
            variances = {name: channels}
        else:
            values[entry["image"]] = result
        values = {name: value for name, value in values.items() if last_use.get(name, -1) > index}
    return result


def _inputs(
    settings: Mapping[str, Any],
    texts: Texts,
    labels: Tensor | None,
    low_res: Tensor | None,
    shape: tuple[int, int],
    noise: Noise,
    device: torch.device,
) -> dict[str, Tensor]:
    """What the network of a stage reads beside the noisy image, but for which of it is kept."""
    inputs: dict[str, Tensor] = {}
    if "text" in settings["conditions"]:
        if list(texts["text"].shape[2:]) != settings["text_shape"]:
            found = list(texts["text"].shape[2:])
            raise ValueError(f"prompt_embeds: {found} wide, this cascade reads {settings['text_shape']}")
        inputs |= {name: each[:, : settings["max_tokens"]] for name, each in texts.items()}
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
    if mode == "bilinear_corners":
        return F.interpolate(image, size=shape, mode="bilinear", align_corners=True)
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

    def estimate(x: Tensor, sigma: float, is_guided: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        total, variance = torch.zeros_like(x), None
        level = torch.full((len(x),), sigma, device=x.device)
        for index, (weight, dropped) in enumerate(guided if is_guided else plain):
            given = dict(inputs)
            replaces = "text" in dropped and "null_text" in given
            if replaces:
                given |= {"text": given["null_text"], "text_mask": given["null_text_mask"]}
            for name in ("text", "labels"):
                is_kept = name not in dropped or (name == "text" and replaces)
                given[f"{name}_keep"] = torch.full((len(x),), is_kept, device=x.device)
            if "low_res" in dropped:
                given["low_res"] = torch.zeros_like(given["low_res"])
            found, channels = network(x, level, **given)
            total, variance = total + weight * found, channels if index == 0 else variance
        count()
        return total, _threshold(total, settings["threshold"]), variance

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


def stage_seed(seed: int, stage: int) -> int:
    """The seed of one stage's generator."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stage}".encode()).digest()[:8], "big") >> 1
