"""Validation loss, and grids of drawn images."""

import math
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import Tensor, nn

from imagen_core.diffusion import Denoiser, DenoiserConfig, Guidance, Threshold, guided
from imagen_core.diffusion.steps import Karras
from imagen_core.images import in_range, tile, to_pixels
from imagen_core.prior import PriorSamplingConfig, generate_embeddings, prior_similarities
from imagen_core.samplers import DpmSolverPP2M, SeededNoise, sample
from imagen_core.store import Store
from imagen_core.train.augment import grayscale
from imagen_core.train.config import TrainConfig
from imagen_core.train.data.dropout import NO_DROPOUT
from imagen_core.train.data.example import make_example, whole_conditions
from imagen_core.train.data.online import Encode, with_text
from imagen_core.train.data.randomness import mix
from imagen_core.train.data.stream import Batch, full_images, loader_arguments, random_views
from imagen_core.train.parallel.precision import autocast_dtype
from imagen_core.train.parallel.world import World


@torch.no_grad()
def validation_loss(
    loss: nn.Module, denoiser: Denoiser, store: Store, config: TrainConfig, world: World, encode: Encode | None = None
) -> float:
    """Mean loss over the validation samples, with the same noise and evenly spread noise levels every time."""
    count = config.num_validation_samples
    fixed = _of_validation(config)
    loader = store.loader(
        batch_size=config.micro_batch_size or max(1, config.batch_size // world.size),
        **loader_arguments(config, online=encode is not None),
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        shuffle=False,
        samples=range(len(store) - count, len(store)),
        crop=random_views(fixed),
    )
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    done = 0
    for raw in loader:
        state = loader.state_dict()
        size = (state["position"] or count) - done
        first = done + world.rank * size // world.size
        batch = Batch(
            with_text(raw, encode, config.denoiser.network.text_dim or 0, config.max_tokens),
            range(first, first + len(raw["keys"])),
            size,
            -(-size // world.size),
            state,
        )
        example = make_example(batch, fixed, denoiser, world.device, step=0)
        losses = loss(example)
        total += losses[: len(batch.keys)].sum().double()
        done += size
    return float(world.sum(total)) / count


def _of_validation(config: TrainConfig) -> TrainConfig:
    """Random numbers of its own; nothing left out or blurred; a level for each low-resolution image.

    Its colours are left out only if they always are.
    """
    changes: dict[str, object] = {**NO_DROPOUT, "low_res_blur": None, "seed": mix(config.seed, 4)}
    changes["low_res_grayscale"] = float(config.low_res_grayscale == 1)
    settings = config.denoiser
    if isinstance(settings, DenoiserConfig) and settings.low_res_noise is not None:
        noise = settings.low_res_noise.model_copy(update={"per": "sample"})
        changes["denoiser"] = settings.model_copy(update={"low_res_noise": noise})
    return config.model_copy(update=changes)


@torch.no_grad()
def sample_grid(
    denoiser: Denoiser, store: Store, config: TrainConfig, world: World, encode: Encode | None = None
) -> np.ndarray:
    """Images drawn for captions of the store (the validation samples, if there are any): uint8 (h, w, 3).

    A super-resolution model enlarges the store's own low-resolution images.
    """
    settings, count = config.denoiser, min(config.num_grid_images, len(store))
    assert isinstance(settings, DenoiserConfig)
    first = len(store) - config.num_validation_samples if config.num_validation_samples >= count else 0
    loader = store.loader(
        batch_size=count,
        **loader_arguments(config, online=encode is not None),
        shuffle=False,
        samples=range(first, first + count),
        crop=full_images(config),
    )
    raw = with_text(next(iter(loader)), encode, settings.unet.text_dim or 0, config.max_tokens)
    shape = (settings.unet.in_channels, settings.size_px, settings.size_px)
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    conditioning = whole_conditions(raw, settings.unet, world.device, dtype)
    if settings.low_res_px is not None:
        low_res = in_range(raw["images"][settings.low_res_px].to(world.device), dtype)
        low_res = grayscale(low_res) if config.low_res_grayscale == 1 else low_res
        noise = SeededNoise(range(count), stream=1).normal(shape, world.device, dtype)
        conditioning = denoiser.with_sampling_low_res(conditioning, low_res, noise)
    guidance = Guidance(**dict.fromkeys(("text", "transcription", "labels"), config.grid_guidance))
    half = autocast_dtype(config.precision)
    with torch.autocast(world.device.type, half, enabled=half is not None):
        result = sample(
            DpmSolverPP2M(),
            guided(denoiser, conditioning, guidance, Threshold()),
            Karras().sigmas(settings.diffusion.schedule, config.grid_num_steps),
            SeededNoise(range(count)),
            shape,
            device=world.device,
            dtype=dtype,
        )
    return tile(list(to_pixels(result)), columns=math.ceil(math.sqrt(count)))


@torch.no_grad()
def similarities(
    denoiser: Denoiser, store: Store, config: TrainConfig, world: World, encode: Encode | None = None
) -> dict[str, float]:
    """Mean cosines between embeddings that a prior draws for the validation samples and the true ones.

    Returns:
        The fields of `PriorSimilarities`, for each number of sampling steps as NAME_STEPS, but `baseline` once.
    """
    count = config.num_validation_samples
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    loader = store.loader(
        batch_size=config.micro_batch_size or config.batch_size,
        **loader_arguments(config, online=encode is not None),
        shuffle=False,
        samples=range(len(store) - count, len(store)),
    )
    found: dict[str, float] = {}
    drawn: dict[int, list[Tensor]] = {steps: [] for steps in config.similarity_num_steps}
    images, texts = [], []
    half = autocast_dtype(config.precision)
    with torch.autocast(world.device.type, half, enabled=half is not None):
        for raw in loader:
            read = with_text(raw, encode, config.denoiser.network.text_dim or 0, config.max_tokens)
            conditioning = whole_conditions(read, config.denoiser.network, world.device, dtype)
            assert conditioning.image_embed is not None
            assert conditioning.text_embed is not None
            images.append(conditioning.image_embed)
            texts.append(conditioning.text_embed)
            captions = replace(conditioning, image_embed=None)
            for steps, rows in drawn.items():
                seeds = [sum(map(len, rows)) + row for row in range(len(raw["keys"]))]
                settings = PriorSamplingConfig(num_steps=steps)
                rows.append(generate_embeddings(denoiser, captions, seeds, settings, dtype=dtype))
    for steps, rows in drawn.items():
        for name, value in asdict(prior_similarities(torch.cat(rows), torch.cat(images), torch.cat(texts))).items():
            found[name if name == "baseline" else f"{name}_{steps}"] = value
    return found
