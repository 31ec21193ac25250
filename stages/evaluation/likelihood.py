"""Bits per dimension of stored images under a trained stage: `imagen_core.diffusion.likelihood` over a store."""

import hashlib
import logging
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from imagen_core.diffusion import bits_per_dimension
from imagen_core.diffusion.schedules import Discrete
from imagen_core.diffusion.steps import AnyGrid, Uniform
from imagen_core.images import in_range
from imagen_core.samplers import SeededNoise
from imagen_core.sealed import DamagedFileError, read_sealed, sealed
from imagen_core.store import Store, StoreError
from imagen_core.store.records import EmbeddingGroup
from imagen_core.text_batch import each_encoder
from imagen_core.train import LoadedDenoiser, TrainError
from imagen_core.train.data.example import all_conditions
from imagen_core.train.data.store_images import condition_images
from pipeline.config import Config
from pipeline.errors import ConfigError, StaleOutputError
from pipeline.fingerprint import differences
from pipeline.job import Job
from pipeline.storage.files import write_text
from stages.checkpoints.load import comparable_origin, load_checkpoint_from, origin
from stages.device import choose_device
from stages.encoders.identity import record_changes

log = logging.getLogger(__name__)
_CHANGES_NOTHING = {"device"}
_PER_STEP = ("bound_bits", "x0_mse", "noise_mse")


class LikelihoodConfig(Config):
    """Which images, and under which model."""

    checkpoint: str
    """Run folder of a training (its newest checkpoint is taken), or a checkpoint folder; a path or a URL."""
    weights: str | None = None
    """`model`, an average such as `ema-0.9999`, or a rebuilt one such as `power-0.07`; null: the slowest average."""
    store: str
    """Folder or URL of the store. With captions if the model reads them, by the encoder it was trained on."""
    first_image: int = Field(default=0, ge=0)
    """First image, in the store's order; a training does not use its last `validation.num_samples`."""
    num_images: int = Field(default=64, ge=1)
    """How many images."""
    grid: AnyGrid = Uniform()
    """Steps of the bound."""
    num_steps: int | None = Field(default=None, ge=2)
    """How many steps; null: all steps of the model's discrete schedule."""
    clip: bool = True
    """Clip the estimated images to [-1, 1], as sampling does."""
    seed: int = Field(default=0, ge=0)
    """Decides the noise, together with the image's key and nothing else."""
    batch_size: int = Field(default=16, ge=1)
    """Images measured at once; an interrupted run continues after the last finished batch."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type in which the network computes."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` ..."""


def likelihood_plan(config: LikelihoodConfig) -> Mapping[str, object]:
    """What a run would measure, and how many network calls it would take."""
    loaded, store, sigmas = _open(config)
    return {
        "images": config.num_images,
        "size_px": loaded.stage.size_px,
        "steps": len(sigmas) - 1,
        "network_calls": (len(sigmas) - 1) * -(-config.num_images // config.batch_size),
        "checkpoint_step": loaded.step,
        "samples_in_store": len(store),
    }


def measure(config: LikelihoodConfig, job: Job) -> Mapping[str, object]:
    """Measures every batch that is not in the run folder yet; the means over all images.

    `batches/START.json` has the bits of each image, by key, and sums per step.

    Raises:
        ConfigError: checkpoint, store and settings do not fit together.
        StaleOutputError: the folder holds measurements of other settings.
    """
    with job.working_folder() as root:
        return _measure(config, job, root)


def _measure(config: LikelihoodConfig, job: Job, root: Path) -> Mapping[str, object]:
    loaded, store, sigmas = _open(config)
    device = choose_device(config.device)
    _check_folder(config, loaded, store, job, root)
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    loaded.denoiser.to(device, dtype)
    end = config.first_image + config.num_images
    results: list[dict[str, Any]] = []
    for start in range(config.first_image, end, config.batch_size):
        path = root / "batches" / f"{start:08d}.json"
        result = _finished(path)
        if result is None:
            if job.should_stop():
                return {}
            result = _measure_batch(
                config, loaded, store, range(start, min(start + config.batch_size, end)), sigmas, job
            )
            job.check()
            write_text(path, sealed(result).decode())
        results.append(result)
    return {"steps": len(sigmas) - 1, "device": str(device), **_means(results)}


def _finished(path: Path) -> dict[str, Any] | None:
    """The measurements of a batch; None if there are none that can be read."""
    try:
        result = read_sealed(path)
        if missing := {"keys", "bits_per_dimension", "prior_bits", *_PER_STEP} - result.keys():
            raise DamagedFileError(f"{path}: lacks {', '.join(sorted(missing))}")
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        log.warning("%s; the batch is measured again", error)
        return None
    return result


def _measure_batch(
    config: LikelihoodConfig, loaded: LoadedDenoiser, store: Store, samples: range, sigmas: Tensor, job: Job
) -> dict[str, Any]:
    """Bits of each image, and sums per step, from the lowest noise level up; of each aspect-ratio bucket by itself."""
    settings = loaded.stage
    sizes = [size for size in (settings.size_px, settings.low_res_px) if size is not None]
    encoders = {encoder["name"]: encoder.get("layers") for encoder in each_encoder(loaded.encoder)}
    several = isinstance(loaded.encoder, list)
    loader = store.loader(
        batch_size=len(samples),
        images=sizes,
        text=[*encoders] if several else next(iter(encoders), None),
        text_layers={name: layers for name, layers in encoders.items() if layers is not None} or None,
        text_embed=loaded.embed_encoders.get("text_embed", {}).get("name"),
        image_embed=loaded.embed_encoders.get("image_embed", {}).get("name"),
        transcriptions=settings.unet.transcription is not None,
        labels=settings.unet.num_classes is not None,
        arrays=[*loaded.condition_images] or None,
        max_tokens=loaded.max_tokens,
        shuffle=False,
        samples=samples,
    )
    parts = [_measure_images(config, loaded, raw, sigmas, samples.start, job) for raw in loader if raw["keys"]]
    sums = {
        name: [math.fsum(values) for values in zip(*(part[name] for part in parts), strict=True)] for name in _PER_STEP
    }
    return {
        name: sums[name] if name in sums else [value for part in parts for value in part[name]]
        for name in ("keys", "bits_per_dimension", "prior_bits", *_PER_STEP)
    }


def _measure_images(
    config: LikelihoodConfig,
    loaded: LoadedDenoiser,
    raw: Mapping[str, Any],
    sigmas: Tensor,
    start: int,
    job: Job,
) -> dict[str, Any]:
    """Bits of each image of one shape, and sums per step; `start`: the first sample of the batch it is of."""
    settings, weight = loaded.stage, next(loaded.denoiser.parameters())
    device, dtype = weight.device, weight.dtype
    images = {size: in_range(pixels.to(device), dtype) for size, pixels in raw["images"].items()}
    keys: list[str] = raw["keys"]
    x0 = images[settings.size_px]
    seeds = [_noise_seed(config.seed, key) for key in keys]

    def noise(step: int) -> Tensor:
        return SeededNoise(seeds, stream=step).normal(x0.shape[1:], device, dtype)

    try:
        shape = (x0.shape[-2], x0.shape[-1])
        further = condition_images(raw, loaded.condition_images, shape, device, dtype)
        conditioning = replace(all_conditions(raw, settings.unet, device, dtype), images=further)
    except TrainError as error:
        raise ConfigError(f"store {config.store}: {error}") from error
    if settings.low_res_px is not None:
        conditioning = loaded.denoiser.with_sampling_low_res(conditioning, images[settings.low_res_px], noise(-1))
    with torch.autocast(device.type, torch.bfloat16) if config.precision == "bfloat16" else nullcontext():
        found = bits_per_dimension(
            loaded.denoiser,
            x0,
            conditioning,
            sigmas,
            noise,
            clip=config.clip,
            on_step=lambda done, steps: job.lines.show(
                f"image {start - config.first_image} of {config.num_images}, step {done}/{steps}"
            ),
        )
    return {
        "keys": keys,
        "bits_per_dimension": found.total.tolist(),
        "prior_bits": found.prior.tolist(),
        "bound_bits": found.bound.sum(dim=0).tolist(),
        "x0_mse": found.x0_mse.sum(dim=0).tolist(),
        "noise_mse": found.noise_mse.sum(dim=0).tolist(),
    }


def _means(results: list[dict[str, Any]]) -> dict[str, object]:
    results = [result for result in results if result["keys"]]
    totals = [bits for result in results for bits in result["bits_per_dimension"]]
    count = len(totals)
    if not count:
        raise ConfigError("first_image, num_images: all these samples were removed from the store; choose others")
    mean = math.fsum(totals) / count
    spread = math.sqrt(math.fsum((bits - mean) ** 2 for bits in totals) / max(1, count - 1) / count)
    per_step = {
        name: [math.fsum(values) / count for values in zip(*(result[name] for result in results), strict=True)]
        for name in _PER_STEP
    }
    return {
        "images": count,
        "bits_per_dimension": mean,
        "standard_error": spread,
        "prior_bits": math.fsum(bits for result in results for bits in result["prior_bits"]) / count,
        **per_step,
    }


def _open(config: LikelihoodConfig) -> tuple[LoadedDenoiser, Store, Tensor]:
    """The model, the store with everything the model reads, and the noise levels."""
    try:
        loaded = load_checkpoint_from(config.checkpoint, config.weights)
        settings = loaded.stage
    except TrainError as error:
        raise ConfigError(f"checkpoint: {error}") from error
    try:
        store = Store.open(config.store)
    except StoreError as error:
        raise ConfigError(f"store: {error}") from error
    for size in (settings.size_px, settings.low_res_px):
        if size is not None and size not in store.image_sizes:
            raise ConfigError(f"store {config.store}: has no images-{size}, which the model needs; add the size")
    for encoder in each_encoder(loaded.encoder):
        _check_encoder(config, "captions", encoder, store, store.manifest.texts)
    if missing := [name for name in loaded.condition_images if name not in store.arrays]:
        raise ConfigError(f"store {config.store}: has no array {missing[0]!r}, which the model reads; add it")
    _check_encoder(config, "captions", loaded.embed_encoders.get("text_embed"), store, store.manifest.texts)
    _check_encoder(config, "images", loaded.embed_encoders.get("image_embed"), store, store.manifest.image_embeds)
    if config.first_image + config.num_images > len(store):
        raise ConfigError(
            f"num_images: {config.first_image} + {config.num_images} exceeds the {len(store)} samples of "
            f"{config.store}"
        )
    schedule = settings.diffusion.schedule
    steps = config.num_steps or (schedule.num_steps if isinstance(schedule, Discrete) else None)
    if steps is None:
        raise ConfigError(f"num_steps: give it; the model's schedule ({schedule.kind}) is continuous")
    try:
        sigmas = config.grid.sigmas(schedule, steps)
        for sigma, sigma_next in pairwise(sigmas):
            settings.diffusion.check_step(sigma, sigma_next)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return loaded, store, sigmas


def _check_encoder(
    config: LikelihoodConfig,
    what: str,
    trained_on: Mapping[str, Any] | None,
    store: Store,
    groups: Mapping[str, EmbeddingGroup],
) -> None:
    """Refuses a store without the embeddings the model reads, or with embeddings by another encoder."""
    if trained_on is None:
        return
    name = trained_on["name"]
    if name not in groups:
        raise ConfigError(f"store {config.store}: has no encoder of {what} {name!r} (encoders: {sorted(groups)})")
    changes = record_changes(trained_on, store.encoder_record(groups[name], trained_on.get("layers")))
    if changes:
        raise ConfigError(
            f"store {config.store}: its {what} are encoded by another encoder than the model's: {'; '.join(changes)}"
        )


def _check_folder(config: LikelihoodConfig, loaded: LoadedDenoiser, store: Store, job: Job, root: Path) -> None:
    """Refuses a folder with measurements of other settings; with --restart removes them."""
    record = {
        "settings": config.model_dump(mode="json", exclude=_CHANGES_NOTHING),
        "checkpoint": origin(loaded),
        "store": {"sha256": store.manifest.sha256, "removals": store.manifest.num_removals},
    }
    path = root / "likelihood.json"
    measured = sorted((root / "batches").glob("*.json"))
    changes = _changes(path, record) if measured else []
    if changes and not job.options.restart:
        raise StaleOutputError(
            f"{job.run.url}: holds measurements of other settings: {'; '.join(changes[:5])}; "
            "use another --out, or --restart to measure again"
        )
    if changes:
        for batch in measured:
            batch.unlink()
    write_text(path, sealed(record).decode())
    if changes:
        job.send()  # so that no measurement of other settings is taken for one of these


def _changes(path: Path, record: dict[str, Any]) -> list[str]:
    """What differs from the record of the measurements that are there."""
    try:
        previous = read_sealed(path)
        checkpoint = comparable_origin(record["checkpoint"], previous.get("checkpoint"))
        return differences(previous, {**record, "checkpoint": checkpoint})
    except FileNotFoundError:
        return [f"{path.name} is missing, so nothing says what they are of"]
    except DamagedFileError as error:
        return [f"{error}, so nothing says what they are of"]


def _noise_seed(seed: int, key: str) -> int:
    """The seed of an image's noise."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7], "big")
