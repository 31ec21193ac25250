"""Draws images from prompts with a trained cascade, or enlarges images one has."""

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
from stages.sampling.session import SamplingSession, prepare
from stages.sampling.timing import StageTimes


def draw(config: SampleConfig, job: Job) -> Mapping[str, object]:
    """Draws every image that is not in the run folder yet; the facts of the run. See `generate_into`.

    Raises:
        ConfigError: unusable prompts, images or checkpoints.
        StaleOutputError: the folder holds images of other settings.
    """
    with job.working_folder() as root:
        return generate_into(root, prepare(config), job)


def generate_into(root: Path, session: SamplingSession, job: Job, name: str = "") -> Mapping[str, object]:
    """Draws this process's part of the images, without those that are in the folder already.

    `images-SIZE/INDEX.png` is image INDEX after the stage of that size, `grid.png` shows the last stage,
    `images.json` says which prompt and seed each was drawn from.

    Args:
        name: of the folder in the run folder, where it is not the run folder itself.
    Raises:
        ConfigError: unusable images, or an encoder that is not the cascade's.
        StaleOutputError: the folder holds images of other settings.
    """
    config, sizes = session.config, session.cascade.sizes_px
    label = f"{name}: " if name else ""
    index, count = my_part(config)
    _check_folder(root, f"{job.run.url}/{name}".rstrip("/"), session, restart=job.options.restart, alone=count == 1)
    for size in session.sizes_px:
        (root / f"images-{size}").mkdir(exist_ok=True)
    if config.save_text:
        _write_texts(root, session, session.images[index::count])
    todo = [image for image in session.missing(root) if image.index % count == index]
    inpaint = _inpaint(config)
    session.embeddings.prepare(todo)
    if session.prior is not None:
        session.prior.prepare(todo)
    times, done = StageTimes(session.device), 0

    def on_step(stage: int, step: int, steps: int, _: torch.Tensor) -> None:
        if step == steps:
            times.done(str(sizes[stage]))
        job.lines.show(f"{label}image {done} of {len(todo)}, {sizes[stage]} px, step {step}/{steps}")

    for start in range(0, len(todo), config.batch_size):
        if job.should_stop():
            break
        batch = todo[start : start + config.batch_size]
        embeddings = session.embeddings.of(batch)
        times.start(len(batch))
        image_embed = None
        if session.prior is not None:
            image_embed = session.prior.of(batch)
            times.done("prior")
        result = session.cascade.sample(
            embeddings,
            [image.seed for image in batch],
            image_embed=image_embed,
            transcriptions=None
            if session.cascade.max_characters is None
            else [image.transcription for image in batch],
            labels=None if session.cascade.num_classes is None else [image.label for image in batch],
            low_res=_read_sources(config.low_res, batch, session.cascade.stages[0].config.low_res_px),
            init_image=_read_sources(config.init_image, batch, sizes[0]),
            strength=config.strength,
            inpaint=inpaint,
            device=session.device,
            autocast=autocast_dtype(config.precision),
            on_step=on_step,
        )
        pixels = {size: to_pixels(result[size]) for size in session.sizes_px}
        for number, image in enumerate(batch):
            for size, path in session.files(root, image):
                write_png(path, pixels[size][number])
        done += len(batch)
    left = len(session.missing(root))
    if not left:
        _write_grid(root, session.images, sizes[-1])
    return {
        "images": len(session.images),
        "drawn_now": done,
        "missing": left,
        "sizes_px": session.sizes_px,
        "device": str(session.device),
        "embeddings": session.embeddings.origin,
        "seconds_per_image": times.seconds_per_image(),
    }
