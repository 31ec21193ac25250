"""What is computed of a model during its training: validation losses, similarities of a prior, and grids of images."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imagen_core.diffusion import DenoiserConfig, Guidance, Threshold, guided
from imagen_core.diffusion.steps import Karras, Uniform
from imagen_core.images import in_range, tile, to_pixels
from imagen_core.prior import PriorSamplingConfig, generate_embeddings, prior_similarities
from imagen_core.samplers import DpmSolverPP2M, SeededNoise, sample
from imagen_core.store.read.loader import Loader
from imagen_core.store.read.options import LoaderOptions
from imagen_core.train.augment import grayscale
from imagen_core.train.config import TrainConfig
from imagen_core.train.context import TrainingContext
from imagen_core.train.data.dropout import NO_DROPOUT
from imagen_core.train.data.example import all_conditions, make_example
from imagen_core.train.data.online import with_text
from imagen_core.train.data.randomness import RandomStream, mix
from imagen_core.train.data.store import agree, make_loader, validation_samples
from imagen_core.train.data.store_images import condition_images
from imagen_core.train.data.stream import Batch, full_images, loader_options, random_views, read_batches
from imagen_core.train.parallel.precision import autocast_dtype, weights_dtype
from imagen_core.train.parallel.wrap import is_sharded


def validation_metrics(context: TrainingContext) -> dict[str, float]:
    """`validation_loss`; of a mixture the mean of its stores' losses by their shares, and `validation_loss/NAME` of
    each store."""
    shares = context.config.shares
    losses = {name: validation_loss(context, name) for name in shares}
    by_store = {f"validation_loss/{name}": loss for name, loss in losses.items()}
    mean = math.fsum(share * losses[name] for name, share in shares.items())
    return {"validation_loss": mean, **({} if context.config.store is not None else by_store)}


@torch.no_grad()
def validation_loss(context: TrainingContext, name: str) -> float:
    """Mean loss over the validation samples of the store of this name, with the same noise and evenly spread noise
    levels every time."""
    config, world, store = context.config, context.world, context.stores[name]
    fixed, samples = _for_validation(config), validation_samples(store, config)
    micro_batch = config.micro_batch_size or max(1, config.batch_size // world.size)
    options = loader_options(config.by_store()[name], micro_batch, online=context.encode is not None)
    order = {"seed": config.seed, "rank": world.rank, "world_size": world.size, "shuffle": False}
    loader = Loader(store, replace(options, **order, samples=samples, crop=random_views(fixed)))
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    done = 0
    errors: list[Exception] = []
    for raw in read_batches(loader, config, context.encode, errors):
        state = loader.state_dict()
        size = (state["position"] or len(samples)) - done
        first = done + world.rank * size // world.size
        counters = range(first, first + len(raw["keys"]))
        batch = Batch(raw, counters, size, -(-size // world.size), state)
        example = make_example(batch, fixed, context.denoiser, world.device, step=0, null_text=context.null_text)
        losses = context.loss(example).diffusion
        total += losses[: len(batch.keys)].sum().double()
        done += size
    agree(world, errors)
    return float(world.sum(total)) / len(samples)


def _for_validation(config: TrainConfig) -> TrainConfig:
    """Separate random numbers; nothing dropped or corrupted; one noise level for each low-resolution image.

    Low-resolution images are in grayscale only if they always are.
    """
    off: dict[str, object] = {"low_res_blur": None, "low_res_jpeg": None, "low_res_tint": None}
    off["low_res_grayscale"] = float(config.views.low_res_grayscale == 1)
    changes: dict[str, object] = {
        "conditioning_dropout": NO_DROPOUT,
        "views": config.views.model_copy(update=off),
        "seed": mix(config.seed, RandomStream.VALIDATION),
    }
    settings = config.denoiser
    if isinstance(settings, DenoiserConfig) and settings.low_res_noise is not None:
        noise = settings.low_res_noise.model_copy(update={"per": "sample"})
        changes["denoiser"] = settings.model_copy(update={"low_res_noise": noise})
    return config.model_copy(update=changes)


@torch.no_grad()
def sample_grid(context: TrainingContext) -> np.ndarray:
    """Images sampled for captions of the store (the validation samples, if there are any): uint8 (h, w, 3).

    Stores that are mixed have their shares of the captions. A super-resolution model upsamples the store's own
    low-resolution images. Images of aspect-ratio buckets come bucket by bucket, each with the shape of its sample.
    """
    config, device = context.config, context.world.device
    settings, count = config.denoiser, min(config.grid.num_images, *map(len, context.stores.values()))
    assert isinstance(settings, DenoiserConfig)
    dtype, pixels = weights_dtype(config.precision), list[np.ndarray]()
    steps = Karras() if settings.diffusion.flow is None else Uniform(spacing="trailing")
    for raw in _shown_in_grid(context, count):
        seeds = range(len(pixels), len(pixels) + len(raw["keys"]))
        if not seeds:  # all were removed
            continue
        shape = (settings.unet.in_channels, *raw["images"][settings.size_px].shape[-2:])
        further = condition_images(raw, config.condition_images, shape[1:], device, dtype)
        conditioning = replace(all_conditions(raw, settings.unet, device, dtype), images=further)
        if context.null_text is not None:
            conditioning = conditioning.with_null_text(context.null_text)
        if settings.low_res_px is not None:
            low_res = in_range(raw["images"][settings.low_res_px].to(device), dtype)
            low_res = grayscale(low_res) if config.views.low_res_grayscale == 1 else low_res
            noise = SeededNoise(seeds, stream=1).normal(shape, device, dtype)
            conditioning = context.denoiser.with_sampling_low_res(conditioning, low_res, noise)
        guidance = Guidance(**dict.fromkeys(("text", "transcription", "labels"), config.grid.guidance))
        with _autocast(context):
            result = sample(
                DpmSolverPP2M(),
                guided(context.denoiser, conditioning, guidance, Threshold()),
                steps.sigmas(settings.diffusion.schedule, config.grid.num_steps),
                SeededNoise(seeds),
                shape,
                device=device,
                dtype=dtype,
            )
        pixels += list(to_pixels(result))
    return tile(pixels, columns=math.ceil(math.sqrt(len(pixels))))


def _shown_in_grid(context: TrainingContext, count: int) -> list[Mapping[str, Any]]:
    """The samples whose captions a grid shows, in one batch, or in one for each shape; the same on every process."""
    config, errors, batches = context.config, list[Exception](), list[Mapping[str, Any]]()
    samples = {}
    for name, store in context.stores.items():
        first = validation_samples(store, config).start if config.validation.num_samples >= count else 0
        samples[name] = range(first, first + count)
    loader = make_loader(context.stores, config, _plain_options(context, count), samples)
    try:
        for raw in islice(loader, count):  # a mixture never ends
            batches.append(raw)
            if sum(len(batch["keys"]) for batch in batches) >= count:
                break
    except Exception as error:  # noqa: BLE001 - agree raises it
        errors.append(error)
    agree(context.world, errors)
    return [with_text(raw, context.encode, config) for raw in batches]


@torch.no_grad()
def similarities(context: TrainingContext) -> dict[str, float]:
    """Mean cosines between the embeddings a prior generates for the validation samples and the true ones.

    Returns:
        The fields of `PriorSimilarities`, for each number of sampling steps as NAME_STEPS, but `baseline` once.
    """
    config = context.config
    dtype = weights_dtype(config.precision)
    generated: dict[int, list[Tensor]] = {steps: [] for steps in config.validation.similarity_num_steps}
    images, texts = [], []
    errors: list[Exception] = []
    batches = (raw for name in context.stores for raw in _validation_batches(context, name, errors))
    if is_sharded(config, context.world):  # processes meet in each batch, so all must be readable
        batches = list(batches)
        agree(context.world, errors)
    with _autocast(context):
        for raw in batches:
            if errors:
                break
            conditioning = all_conditions(raw, config.denoiser.network, context.world.device, dtype)
            assert conditioning.image_embed is not None
            assert conditioning.text_embed is not None
            images.append(conditioning.image_embed)
            texts.append(conditioning.text_embed)
            captions = replace(conditioning, image_embed=None)
            for steps, rows in generated.items():
                seeds = [sum(map(len, rows)) + row for row in range(len(raw["keys"]))]
                settings = PriorSamplingConfig(num_steps=steps)
                rows.append(generate_embeddings(context.denoiser, captions, seeds, settings, dtype=dtype))
    agree(context.world, errors)
    found: dict[str, float] = {}
    for steps, rows in generated.items():
        for name, value in asdict(prior_similarities(torch.cat(rows), torch.cat(images), torch.cat(texts))).items():
            found[name if name == "baseline" else f"{name}_{steps}"] = value
    return found


def _validation_batches(context: TrainingContext, name: str, errors: list[Exception]) -> Iterator[Mapping[str, Any]]:
    """All validation samples of the store of this name, the same on every process; `errors` as of `read_batches`."""
    config, store = context.config, context.stores[name]
    options = _plain_options(context, config.micro_batch_size or config.batch_size)
    captions = config.by_store()[name].captions
    loader = Loader(store, replace(options, samples=validation_samples(store, config), caption_sets=captions))
    return read_batches(loader, config, context.encode, errors)


def _plain_options(context: TrainingContext, batch_size: int) -> LoaderOptions:
    """Full images in the store's order."""
    options = loader_options(context.config, batch_size, online=context.encode is not None)
    return replace(options, shuffle=False, crop=full_images(context.config))


def _autocast(context: TrainingContext) -> torch.autocast:
    half = autocast_dtype(context.config.precision)
    return torch.autocast(context.world.device.type, half, enabled=half is not None)
