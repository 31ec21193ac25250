"""Samples images from prompts with a trained cascade, or super-resolves given images."""

from collections.abc import Mapping, Sequence

import torch

from imagen_core.images import to_pixels
from pipeline.job import Job
from stages.images.files import check_images
from stages.sampling.caption_sets import store_of
from stages.sampling.config import SampleConfig
from stages.sampling.inputs import check_init, read_inpaint
from stages.sampling.outputs import ImageFolder, sampling_record
from stages.sampling.requests import ImageRequest, check_requests, process_share, resolve_requests
from stages.sampling.session import SamplingSession, load_session
from stages.sampling.shapes import batches_of, with_shapes
from stages.sampling.timing import StageTimes


def sample(config: SampleConfig, job: Job) -> Mapping[str, object]:
    """Generates every image that is not in the run folder yet; returns the summary. See `sample_into`.

    Raises:
        ConfigError: unusable prompts, images or checkpoints.
        StaleOutputError: the folder holds images of other settings.
    """
    with job.working_folder() as root:
        requests, session = prepare(config)
        folder = ImageFolder(root, requests, config.output.written_px(session.cascade.sizes_px))
        return sample_into(folder, config, session, job)


def prepare(config: SampleConfig) -> tuple[list[ImageRequest], SamplingSession]:
    """Which images to generate, and the models, loaded.

    Raises:
        ConfigError: unusable prompts or checkpoints.
    """
    requests = resolve_requests(config)
    session = load_session(
        config.stages,
        config.prior,
        last_px=config.output.size_px,
        store=store_of(config.captions),
        encoder_model=config.encoder_model,
        text_embed_model=config.text_embed_model,
        precision=config.precision,
        device=config.device,
        negative_prompt=config.negative_prompt,
    )
    check_requests(requests, session.cascade)
    check_init(config.init, session.cascade.stages[0])
    requests = with_shapes(requests, config, session.cascade)
    check_images(dict.fromkeys(path for each in requests for path in each.paths))
    if config.inpaint is not None:
        read_inpaint(config.inpaint)
    return requests, session


def claim_folder(
    folder: ImageFolder, config: SampleConfig, session: SamplingSession, job: Job, name: str = ""
) -> None:
    """Records what the folder's images are made of, before the first one; the same again changes nothing.

    Raises:
        ConfigError: an image to read is missing.
        StaleOutputError: the folder holds images of other settings.
    """
    record = sampling_record(config.recorded(), session, folder.requests, config.inpaint)
    url = f"{job.run.url}/{name}".rstrip("/")
    folder.claim(record, url, restart=job.options.restart, alone=process_share(config.part)[1] == 1)
    if job.options.restart:
        job.send()  # so that no image of other settings is taken for one of these


def sample_into(
    folder: ImageFolder, config: SampleConfig, session: SamplingSession, job: Job, name: str = ""
) -> Mapping[str, object]:
    """Generates this process's share of the images, without those that are in the folder already.

    `images-SIZE/INDEX.png` is image INDEX after the stage of that size, `grid.png` shows the last stage,
    `images.json` says from which prompt and seed each was generated.

    Args:
        name: of the folder in the run folder, if it is not the run folder itself.
    Raises:
        ConfigError: unusable images, or an encoder that is not the cascade's.
        StaleOutputError: the folder holds images of other settings.
    """
    share, num_shares = process_share(config.part)
    claim_folder(folder, config, session, job, name)
    url = f"{job.run.url}/{name}".rstrip("/")
    if config.output.text:
        folder.write_texts(folder.requests[share::num_shares])
    if damaged := folder.remove_damaged(folder.requests[share::num_shares]):
        job.lines.message(f"{url}: {damaged:,} images cannot be read, and are generated again")
    todo = [request for request in folder.missing() if request.index % num_shares == share]
    times = _generate(todo, folder, config, session, job, f"{name}: " if name else "")
    num_missing = len(folder.missing())
    if not num_missing:
        job.check()
        folder.write_grid()
    return {
        "images": len(folder.requests),
        "generated_now": times.num_images,
        "missing": num_missing,
        "sizes_px": list(folder.sizes_px),
        "device": str(session.device),
        "embeddings": session.embeddings.origin,
        "seconds_per_image": times.seconds_per_image(),
    }


def _generate(
    todo: Sequence[ImageRequest],
    folder: ImageFolder,
    config: SampleConfig,
    session: SamplingSession,
    job: Job,
    label: str,
) -> StageTimes:
    """Generates and writes the images batch by batch until the run is stopped; counts and times them."""
    sizes, times = session.cascade.sizes_px, StageTimes(session.device)
    strength = 1.0 if config.init is None else config.init.strength
    encode_init = config.init is not None and config.init.encode
    session.encode(todo)
    start = 0

    def on_step(stage: int, step: int, steps: int, _: torch.Tensor) -> None:
        if step == steps:
            times.done(str(sizes[stage]))
        job.lines.show(f"{label}image {start} of {len(todo)}, {sizes[stage]} px, step {step}/{steps}")

    for batch in batches_of(todo, config.batch_size):
        if job.should_stop():
            break
        inpaint = None if config.inpaint is None else read_inpaint(config.inpaint, batch[0].shape)
        text = session.embeddings.of(batch)
        times.start(len(batch))
        image_embed = session.image_embeds(batch)
        if image_embed is not None:
            times.done("prior")
        images = session.generate(
            batch,
            text,
            image_embed,
            strength=strength,
            encode_init=encode_init,
            inpaint=inpaint,
            on_step=on_step,
        )
        job.check()
        folder.write_images(batch, {size: to_pixels(images[size]) for size in folder.sizes_px})
        start += len(batch)
    return times
