"""Draws pictures from prompts with a trained cascade, or enlarges pictures one has."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from imagen_core.cascade import Cascade
from imagen_core.models.characters import character_ids
from imagen_core.pictures import from_pixels, read_picture, tile, to_pixels, write_png
from imagen_core.samplers import Inpaint
from imagen_core.train.precision import autocast_dtype
from pipeline.errors import ConfigError, StaleOutputError
from pipeline.files import file_digest, read_json, write_json, write_text
from pipeline.fingerprint import differences
from pipeline.job import Job
from stages.captions import is_valid_text
from stages.device import choose_device
from stages.sample_cascade import load_cascade
from stages.sample_config import SampleConfig
from stages.sample_pictures import Picture, my_part, pictures_to_draw
from stages.sample_prior import PriorDrawing, load_prior
from stages.sample_text import Embeddings
from stages.sample_times import StageTimes

_SWEPT = frozenset({"text", "labels", "image_embed"})


@dataclass(frozen=True, slots=True)
class Drawing:
    """What is loaded once, to draw into one folder or several."""

    config: SampleConfig
    pictures: list[Picture]
    """Those of all processes."""
    cascade: Cascade
    origins: list[dict[str, object]]
    """Of each stage, which checkpoint it is from."""
    embeddings: Embeddings
    prior: PriorDrawing | None
    device: torch.device

    @property
    def sizes_px(self) -> list[int]:
        """Sizes of the pictures that are kept."""
        return self.cascade.sizes_px if self.config.save_all_sizes else self.cascade.sizes_px[-1:]

    def files(self, root: Path, picture: Picture) -> Iterator[tuple[int, Path]]:
        """Size and path of each file of a picture."""
        return ((size, root / f"images-{size}" / picture.name) for size in self.sizes_px)

    def missing(self, root: Path) -> list[Picture]:
        """Pictures that the folder has not in all sizes."""
        return [p for p in self.pictures if not all(path.exists() for _, path in self.files(root, p))]

    def with_guidance(self, weight: float, stages: Literal["all", "first"]) -> "Drawing":
        """The same with another weight of captions, labels and picture embeddings, at all stages that read them or at
        the first.

        Raises:
            ConfigError: no stage reads any of them.
        """
        drawing = list(self.cascade.stages)
        chosen = drawing if stages == "all" else drawing[:1]
        if not any(stage.conditions & _SWEPT for stage in chosen):
            raise ConfigError("guidance: no stage reads captions, labels or picture embeddings; leave it out")
        for number, stage in enumerate(chosen):
            weights: dict[str, float] = dict.fromkeys(_SWEPT & stage.conditions, weight)
            guidance = stage.sampling.guidance.model_copy(update=weights)
            drawing[number] = replace(stage, sampling=stage.sampling.model_copy(update={"guidance": guidance}))
        configs = list(self.config.stages)
        for number, stage in enumerate(drawing):  # output_px leaves out the last
            configs[number] = configs[number].model_copy(update={"sampling": stage.sampling})
        config = self.config.model_copy(update={"stages": tuple(configs)})
        return replace(self, config=config, cascade=Cascade(drawing, self.cascade.encoder))


def draw(config: SampleConfig, job: Job) -> Mapping[str, object]:
    """Draws every picture that is not in the run folder yet; the facts of the run. See `draw_into`.

    Raises:
        ConfigError: unusable prompts, pictures or checkpoints.
        StaleOutputError: the folder holds pictures of other settings.
    """
    with job.working_folder() as root:
        return draw_into(root, prepare(config), job)


def prepare(config: SampleConfig) -> Drawing:
    """Loads the cascade and finds out what to draw.

    Raises:
        ConfigError: unusable prompts or checkpoints.
    """
    pictures = pictures_to_draw(config)
    loaded = load_cascade(config)
    cascade, origins = loaded.cascade, loaded.origins
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
    _check_transcriptions(config, pictures, cascade)
    _check_labels(config, pictures, cascade)
    device = choose_device(config.device)
    prior = load_prior(config, loaded.checkpoints, device)
    if prior is not None:
        origins = [*origins, prior.origin]
    embeddings = Embeddings(config, cascade.encoder, model=config.encoder_model, use_gpu=device.type == "cuda")
    return Drawing(config, pictures, cascade, origins, embeddings, prior, device)


def draw_into(root: Path, drawing: Drawing, job: Job, name: str = "") -> Mapping[str, object]:
    """Draws this process's part of the pictures, without those that are in the folder already.

    `images-SIZE/INDEX.png` is picture INDEX after the stage of that size, `grid.png` shows the last stage,
    `pictures.json` says which prompt and seed each was drawn from.

    Args:
        name: of the folder in the run folder, where it is not the run folder itself.
    Raises:
        ConfigError: unusable pictures, or an encoder that is not the cascade's.
        StaleOutputError: the folder holds pictures of other settings.
    """
    config, sizes = drawing.config, drawing.cascade.sizes_px
    label = f"{name}: " if name else ""
    index, count = my_part(config)
    _check_folder(root, f"{job.run.url}/{name}".rstrip("/"), drawing, restart=job.options.restart, alone=count == 1)
    for size in drawing.sizes_px:
        (root / f"images-{size}").mkdir(exist_ok=True)
    if config.save_text:
        _write_texts(root, drawing, drawing.pictures[index::count])
    todo = [picture for picture in drawing.missing(root) if picture.index % count == index]
    inpaint = _inpaint(config)
    drawing.embeddings.prepare(todo)
    if drawing.prior is not None:
        drawing.prior.prepare(todo)
    times, done = StageTimes(drawing.device), 0

    def on_step(stage: int, step: int, steps: int, _: torch.Tensor) -> None:
        if step == steps:
            times.done(str(sizes[stage]))
        job.lines.show(f"{label}picture {done} of {len(todo)}, {sizes[stage]} px, step {step}/{steps}")

    for start in range(0, len(todo), config.batch_size):
        if job.should_stop():
            break
        batch = todo[start : start + config.batch_size]
        embeddings = drawing.embeddings.of(batch)
        times.start(len(batch))
        image_embed = None
        if drawing.prior is not None:
            image_embed = drawing.prior.of(batch)
            times.done("prior")
        result = drawing.cascade.sample(
            embeddings,
            [picture.seed for picture in batch],
            image_embed=image_embed,
            transcriptions=None
            if drawing.cascade.max_characters is None
            else [picture.transcription for picture in batch],
            labels=None if drawing.cascade.num_classes is None else [picture.label for picture in batch],
            low_res=_read_sources(config.low_res, batch, drawing.cascade.stages[0].config.low_res_px),
            init_image=_read_sources(config.init_image, batch, sizes[0]),
            strength=config.strength,
            inpaint=inpaint,
            device=drawing.device,
            autocast=autocast_dtype(config.precision),
            on_step=on_step,
        )
        pixels = {size: to_pixels(result[size]) for size in drawing.sizes_px}
        for number, picture in enumerate(batch):
            for size, path in drawing.files(root, picture):
                write_png(path, pixels[size][number])
        done += len(batch)
    left = len(drawing.missing(root))
    if not left:
        _write_grid(root, drawing.pictures, sizes[-1])
    return {
        "pictures": len(drawing.pictures),
        "drawn_now": done,
        "missing": left,
        "sizes_px": drawing.sizes_px,
        "device": str(drawing.device),
        "embeddings": drawing.embeddings.origin,
        "seconds_per_picture": times.seconds_per_picture(),
    }


_CHANGES_NOTHING = {
    *("batch_size", "device", "encoder_model", "part", "save_all_sizes", "save_text"),
    *("captions", "transcriptions", "labels"),  # the texts and numbers themselves are recorded
}


def _check_folder(root: Path, url: str, drawing: Drawing, *, restart: bool, alone: bool) -> None:
    """Refuses a folder with pictures of other settings; with --restart removes them."""
    record = {
        "settings": drawing.config.model_dump(mode="json", exclude=_CHANGES_NOTHING),
        "stages": drawing.origins,
        "sources": _digests(drawing.config),
        "pictures": [
            {"file": p.name, "prompt": p.prompt, "seed": p.seed, "key": p.caption.key}
            | ({} if drawing.cascade.max_characters is None else {"transcription": p.transcription})
            | ({} if drawing.cascade.num_classes is None else {"label": p.label})
            for p in drawing.pictures
        ],
    }
    path = root / "pictures.json"
    drawn = any(root.glob("images-*/*.png"))
    former = read_json(path) if drawn else None
    changes = [] if former is None else differences(_by_file(former), _by_file(record))
    if changes and not (restart and alone):
        remedy = "use another --out, or --restart to draw them anew" + ("" if alone else " (in one process, at first)")
        raise StaleOutputError(f"{url}: holds pictures of other settings: {'; '.join(changes[:5])}; {remedy}")
    if changes:
        for file in root.glob("images-*/*"):
            file.unlink()
    write_json(path, record)


def _check_transcriptions(config: SampleConfig, pictures: Sequence[Picture], cascade: Cascade) -> None:
    """Raises ConfigError if some are too long, are no text, or were asked for and no stage reads them."""
    texts = [picture.transcription for picture in pictures]
    if cascade.max_characters is None:
        if config.captions is None and any(texts):
            raise ConfigError(
                f"transcriptions: no stage reads them (got {max(texts)!r}); leave them out, or give the checkpoint of "
                "a model with denoiser.unet.transcription"
            )
        return
    bad = next((text for text in texts if not is_valid_text(text)), None)
    if bad is not None:
        raise ConfigError(f"transcriptions: {bad!r} is not valid text; write it in UTF-8")
    try:
        character_ids(texts, cascade.max_characters)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_labels(config: SampleConfig, pictures: Sequence[Picture], cascade: Cascade) -> None:
    """Raises ConfigError if some are no classes, or were asked for and no stage reads them."""
    if cascade.num_classes is None:
        if config.labels:
            raise ConfigError(
                f"labels: no stage reads them (got {config.labels[0]}); leave them out, or give the checkpoint of a "
                "model with denoiser.unet.num_classes"
            )
        return
    wrong = [picture.label for picture in pictures if not -1 <= picture.label < cascade.num_classes]
    if wrong:
        raise ConfigError(
            f"labels: {wrong[0]} is no class; the stages know 0 to {cascade.num_classes - 1}, and -1 for unknown ones"
        )


def _by_file(record: Mapping[str, Any]) -> dict[str, object]:
    """The record with a mapping of pictures, whose differences are lines about single pictures."""
    return {**record, "pictures": {picture["file"]: picture for picture in record["pictures"]}}


def _write_texts(root: Path, drawing: Drawing, pictures: Sequence[Picture]) -> None:
    for picture in pictures:
        for _, path in drawing.files(root, picture):
            if not path.with_suffix(".txt").exists():
                write_text(path.with_suffix(".txt"), picture.prompt + "\n")


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
