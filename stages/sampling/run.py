"""Draws pictures from prompts with a trained cascade, or enlarges pictures one has."""

from collections.abc import Mapping
from pathlib import Path

import torch

from imagen_core.images import to_pixels, write_png
from imagen_core.train.parallel.precision import autocast_dtype
from pipeline.job import Job
from stages.sampling.config import SampleConfig
from stages.sampling.inputs import _inpaint, _read_sources
from stages.sampling.outputs import _check_folder, _write_grid, _write_texts
from stages.sampling.requests import my_part
from stages.sampling.session import Drawing, prepare
from stages.sampling.timing import StageTimes


def draw(config: SampleConfig, job: Job) -> Mapping[str, object]:
    """Draws every picture that is not in the run folder yet; the facts of the run. See `draw_into`.

    Raises:
        ConfigError: unusable prompts, pictures or checkpoints.
        StaleOutputError: the folder holds pictures of other settings.
    """
    with job.working_folder() as root:
        return draw_into(root, prepare(config), job)


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
