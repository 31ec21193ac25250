"""Draws pictures from prompts with a trained cascade, or enlarges pictures one has."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from imagen_core.cascade import Cascade, CascadeStage, SamplingConfig
from imagen_core.pictures import from_pixels, read_picture, tile, to_pixels, write_png
from imagen_core.samplers import Inpaint
from imagen_core.train import TrainError
from pipeline.config import Config
from pipeline.errors import ConfigError, StaleOutputError
from pipeline.files import file_digest, read_json, write_json
from pipeline.fingerprint import differences
from pipeline.job import Job
from stages.checkpoints import load_checkpoint_from
from stages.prompts import encode_prompts


class SampleStageConfig(Config):
    """One stage of the cascade."""

    checkpoint: str
    """Run folder of a training (its newest checkpoint is taken), or a checkpoint folder; a path or a URL."""
    weights: str | None = None
    """`model`, or one of the averages such as `ema-0.9999`; null: the slowest average."""
    sampling: SamplingConfig = SamplingConfig()
    """How it draws."""


class SampleConfig(Config):
    """What to draw, and with what."""

    stages: tuple[SampleStageConfig, ...] = Field(min_length=1)
    """The cascade, smallest pictures first."""
    prompts: tuple[str, ...] = ()
    """What to draw."""
    prompts_file: str | None = None
    """Text file with one prompt a line, instead of `prompts`."""
    num_images_per_prompt: int = Field(default=1, ge=1)
    """Pictures of each prompt, with different seeds."""
    seed: int = Field(default=0, ge=0)
    """Seed of the first picture; the next pictures have the next seeds."""
    seeds: tuple[int, ...] | None = None
    """One seed a picture, instead of `seed`."""
    low_res: tuple[str, ...] = ()
    """Pictures to enlarge, one a prompt: the first stage of `stages` must be a super-resolution stage. The centre
    square is brought to the size that stage enlarges."""
    init_image: tuple[str, ...] = ()
    """Pictures to start from, one a prompt (image to image)."""
    strength: float = Field(default=0.7, ge=0, le=1)
    """How far init_image is sent back into noise: 0 keeps it, 1 forgets it."""
    inpaint_image: str | None = None
    """Picture of which a part is kept."""
    inpaint_mask: str | None = None
    """Picture that is white where inpaint_image is kept."""
    inpaint_resample_times: int = Field(default=5, ge=1)
    """Rounds of drawing and re-noising at each step (RePaint)."""
    batch_size: int = Field(default=8, ge=1)
    """Pictures drawn at once; changes nothing in them but speed."""
    encoder_model: str | None = None
    """Where the text encoder is (hub id or folder), if it is not found under the name it was trained with."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type the network computes in."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` ..."""

    @model_validator(mode="after")
    def _check_prompts(self) -> "SampleConfig":
        if self.prompts and self.prompts_file:
            raise ValueError("give prompts or prompts_file, not both")
        for name, pictures in (("low_res", self.low_res), ("init_image", self.init_image)):
            if pictures and self.prompts and len(pictures) != len(self.prompts):
                raise ValueError(f"{name} has {len(pictures)} pictures for {len(self.prompts)} prompts; give one each")
        if (self.inpaint_image is None) != (self.inpaint_mask is None):
            raise ValueError("inpaint_image and inpaint_mask come together")
        return self


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture to draw."""

    index: int
    prompt: str
    seed: int
    source: int
    """Which prompt, low_res and init_image it is drawn from."""

    @property
    def name(self) -> str:
        return f"{self.index:05d}.png"


def pictures_to_draw(config: SampleConfig) -> list[Picture]:
    """Prompts times pictures a prompt, with their seeds.

    Raises:
        ConfigError: no prompt, an unreadable file, or the wrong number of seeds.
    """
    prompts = _prompts(config)
    count = len(prompts) * config.num_images_per_prompt
    seeds = config.seeds or tuple(range(config.seed, config.seed + count))
    if len(seeds) != count:
        raise ConfigError(f"seeds: {len(seeds)} given for {count} pictures; give one a picture, or `seed`")
    return [
        Picture(index, prompts[index // config.num_images_per_prompt], seed, index // config.num_images_per_prompt)
        for index, seed in enumerate(seeds)
    ]


def _prompts(config: SampleConfig) -> list[str]:
    prompts = list(config.prompts)
    if config.prompts_file is not None:
        try:
            lines = Path(config.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"prompts_file {config.prompts_file}: cannot be read ({error}); give a UTF-8 text file"
            ) from error
        prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        given = len(config.low_res) or len(config.init_image) or int(config.inpaint_image is not None)
        if not given:
            raise ConfigError("prompts: none given; use prompts='[a small red circle]' or prompts_file=FILE")
        return [""] * given
    for name, pictures in (("low_res", config.low_res), ("init_image", config.init_image)):
        if pictures and len(pictures) != len(prompts):
            raise ConfigError(f"{name}: {len(pictures)} pictures for {len(prompts)} prompts; give one each")
    return prompts


def draw(config: SampleConfig, job: Job) -> Mapping[str, object]:
    """Draws every picture that is not in the run folder yet; the facts of the run.

    `images-SIZE/INDEX.png` is picture INDEX after the stage of that size, `grid.png` shows the last stage,
    `pictures.json` says which prompt and seed each was drawn from.

    Raises:
        ConfigError: unusable prompts, pictures or checkpoints.
        StaleOutputError: the folder holds pictures of other settings.
    """
    with job.working_folder() as root:
        return _draw(config, job, root)


def _draw(config: SampleConfig, job: Job, root: Path) -> Mapping[str, object]:
    pictures = pictures_to_draw(config)
    cascade, origins = load_cascade(config)
    if cascade.stages[0].is_super_resolution and not config.low_res:
        raise ConfigError(
            f"low_res: the first stage ({cascade.sizes_px[0]} px) needs a low-resolution picture; give one a prompt, "
            "or begin with a base stage"
        )
    if config.low_res and not cascade.stages[0].is_super_resolution:
        raise ConfigError(
            f"low_res: the first stage ({cascade.sizes_px[0]} px) is a base model and reads no picture; leave base "
            "stages out of `stages`, or use init_image"
        )
    device = _device(config.device)
    _check_folder(config, pictures, origins, job, root)
    sizes = cascade.sizes_px
    for size in sizes:
        (root / f"images-{size}").mkdir(exist_ok=True)
    missing = [p for p in pictures if not all((root / f"images-{size}" / p.name).exists() for size in sizes)]
    inpaint = _inpaint(config)
    text = _encode(missing, cascade, config, use_gpu=device.type == "cuda")
    for start in range(0, len(missing), config.batch_size):
        if job.should_stop():
            break
        batch = missing[start : start + config.batch_size]
        result = cascade.sample(
            None if text is None else [text[picture.prompt] for picture in batch],
            [picture.seed for picture in batch],
            low_res=_read_sources(config.low_res, batch, cascade.stages[0].denoiser.config.low_res_px),
            init_image=_read_sources(config.init_image, batch, sizes[0]),
            strength=config.strength,
            inpaint=inpaint,
            device=device,
            autocast=torch.bfloat16 if config.precision == "bfloat16" else None,
            on_step=lambda stage, step, steps, _, done=start: job.lines.show(
                f"picture {done} of {len(missing)}, {sizes[stage]} px, step {step}/{steps}"
            ),
        )
        for size, images in result.items():
            for picture, pixels in zip(batch, to_pixels(images), strict=True):
                write_png(root / f"images-{size}" / picture.name, pixels)
    else:
        _write_grid(root, pictures, sizes[-1])
    return {"pictures": len(pictures), "drawn_now": len(missing), "sizes_px": sizes, "device": str(device)}


def load_cascade(config: SampleConfig) -> tuple[Cascade, list[dict[str, object]]]:
    """The cascade, and for each stage which checkpoint it is from.

    Raises:
        ConfigError: a checkpoint is missing, damaged, or was trained with another encoder than the others.
    """
    stages: list[CascadeStage] = []
    origins: list[dict[str, object]] = []
    encoder: Mapping[str, object] | None = None
    for number, stage in enumerate(config.stages):
        try:
            loaded = load_checkpoint_from(stage.checkpoint, stage.weights)
        except TrainError as error:
            raise ConfigError(f"stages.{number}.checkpoint: {error}") from error
        if loaded.encoder is not None and encoder is not None:
            changes = differences(dict(encoder), dict(loaded.encoder))
            if changes:
                raise ConfigError(
                    f"stages.{number}.checkpoint: was trained with another encoder than the stage before it: "
                    f"{'; '.join(changes)}; take stages trained on one encoder"
                )
        encoder = encoder or loaded.encoder
        stages.append(CascadeStage(loaded.denoiser, stage.sampling, loaded.max_tokens))
        origins.append({"step": loaded.step, "weights": loaded.weights, "sha256": loaded.sha256})
    try:
        return Cascade(stages, None if encoder is None else dict(encoder)), origins
    except ValueError as error:
        raise ConfigError(str(error)) from error


_CHANGES_NOTHING = {"batch_size", "device", "encoder_model"}


def _check_folder(config: SampleConfig, pictures: Sequence[Picture], origins: object, job: Job, root: Path) -> None:
    """Refuses a folder with pictures of other settings; with --restart removes them."""
    record = {
        "settings": config.model_dump(mode="json", exclude=_CHANGES_NOTHING),
        "stages": origins,
        "sources": _digests(config),
        "pictures": [{"file": p.name, "prompt": p.prompt, "seed": p.seed} for p in pictures],
    }
    path = root / "pictures.json"
    drawn = any(root.glob("images-*/*.png"))
    former = read_json(path) if drawn else None
    changes = [] if former is None else differences(former, record)
    if changes and not job.options.restart:
        raise StaleOutputError(
            f"{job.run.url}: holds pictures of other settings: {'; '.join(changes[:5])}; "
            "use another --out, or --restart to draw them anew"
        )
    if changes:
        for picture in root.glob("images-*/*.png"):
            picture.unlink()
    write_json(path, record)


def _digests(config: SampleConfig) -> dict[str, str]:
    """SHA-256 of each picture that is read, by its path."""
    single = (config.inpaint_image, config.inpaint_mask)
    paths = {*config.low_res, *config.init_image, *(path for path in single if path is not None)}
    try:
        return {path: file_digest(Path(path)) for path in sorted(paths)}
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: cannot be read as a picture ({error.strerror}); check the path"
        ) from error


def _encode(
    pictures: Sequence[Picture], cascade: Cascade, config: SampleConfig, *, use_gpu: bool
) -> dict[str, np.ndarray] | None:
    """Embeddings by prompt; None if no stage reads captions."""
    if cascade.encoder is None:
        return None
    prompts = sorted({picture.prompt for picture in pictures})
    if not prompts:
        return {}
    embeddings = encode_prompts(prompts, cascade.encoder, model=config.encoder_model, use_gpu=use_gpu)
    return dict(zip(prompts, embeddings, strict=True))


def _read_sources(paths: Sequence[str], batch: Sequence[Picture], size_px: int | None) -> torch.Tensor | None:
    """Centre squares (b, 3, size_px, size_px) in [-1, 1], or None if there are no pictures to read."""
    if not paths:
        return None
    try:
        pixels = [read_picture(paths[picture.source], size_px) for picture in batch]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return from_pixels(np.stack(pixels))


def _inpaint(config: SampleConfig) -> Inpaint | None:
    if config.inpaint_image is None or config.inpaint_mask is None:
        return None
    try:
        image, mask = read_picture(config.inpaint_image), read_picture(config.inpaint_mask)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if image.shape != mask.shape:
        raise ConfigError(f"inpaint_mask: {mask.shape[:2]} pixels for a picture of {image.shape[:2]}; make them equal")
    height, width, _ = image.shape
    side = min(height, width)
    square = np.s_[(height - side) // 2 :, (width - side) // 2 :]
    image, mask = image[square][:side, :side], mask[square][:side, :side]
    keep = torch.from_numpy(mask[None, None, ..., 0] >= 128)
    return Inpaint(from_pixels(image[None]), keep, config.inpaint_resample_times)


def _write_grid(root: Path, pictures: Sequence[Picture], size: int) -> None:
    shown = [read_picture(root / f"images-{size}" / picture.name) for picture in pictures[:64]]
    write_png(root / "grid.png", tile(shown, columns=math.ceil(math.sqrt(len(shown)))))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {name!r} is none that torch knows; use auto, cpu or cuda") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"device: {name!r} is not there ({count} GPUs found); use auto or cpu")
    return device
