"""Judges images: draws them first, if asked, with one guidance weight or several."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from pipeline.errors import ConfigError
from pipeline.job import Job
from stages.evaluation.config import EvaluateConfig
from stages.evaluation.features.gather import FeatureCache, FeatureSet, gather, read_set
from stages.evaluation.features.image_sets import (
    AnyImageSet,
    FeatureFiles,
    ImageSet,
    image_files,
    image_samples,
)
from stages.evaluation.metrics import compute_metrics
from stages.evaluation.report import write_report
from stages.sampling.caption_sets import StoreCaptions
from stages.sampling.config import SampleConfig
from stages.sampling.requests import my_part
from stages.sampling.run import generate_into
from stages.sampling.session import SamplingSession, prepare


def evaluate(config: EvaluateConfig, job: Job) -> Mapping[str, object]:
    """Draws what is not there yet, then writes `results.json`, `results.md` and, of several weights, a plot.

    Images are in `drawn/`, or in `guidance-WEIGHT/` each, as `pipeline run sample` writes them; features are kept in
    `features/`. Of several processes all draw, and the first one judges once all images are there.

    Raises:
        ConfigError: unusable settings, images or checkpoints.
        StaleOutputError: a folder holds images of other settings.
        MachineError: a model cannot be found.
    """
    with job.working_folder() as root:
        return _evaluate(config, job, root)


def _evaluate(config: EvaluateConfig, job: Job, root: Path) -> Mapping[str, object]:
    facts: dict[str, object] = {}
    fingerprints = _fingerprints(config)  # a model that cannot be had is found before anything is drawn
    if config.draw is not None:
        if config.clip is not None:
            config.clip.check_captions()
        sessions = _sessions(config, config.draw)
        drawn = {name: generate_into(root / name, each, job, name) for name, each in sessions.items()}
        missing = sum(int(str(one["missing"])) for one in drawn.values())
        facts = {"drawn": drawn, "missing": missing}
        if missing or job.should_stop() or not _computes_metrics(config.draw):
            return facts
        sets = {name: _generated_images(root / name, each, config) for name, each in sessions.items()}
        originals = None if config.lpips is None else _originals(next(iter(sessions.values())), config)
    else:
        assert config.generated is not None
        sets = {"generated": config.generated}
        originals = None if config.lpips is None else _opened("reference", config.reference)
    cache = FeatureCache(root / "features")
    reference = None if config.reference is None else _feature_set("reference", config.reference, config, cache)
    rows: list[Mapping[str, object]] = []
    features = None
    for number, (name, images) in enumerate(sets.items()):
        if job.should_stop():
            return facts
        job.lines.show(f"{name}: features")
        features = _feature_set(name, images, config, cache, originals)
        weight = {"guidance": config.guidance[number]} if config.guidance else {}
        rows.append({"name": name, **weight, **compute_metrics(features, reference, config)})
    label = next((s.label for s in (features, reference) if s is not None and s.label is not None), None)
    clip = None if config.clip is None else config.clip.label
    results = {"features_model": label, "clip_model": clip, "fingerprints": fingerprints, "rows": rows}
    return {**facts, **results, "files": write_report(root, results)}


def _sessions(config: EvaluateConfig, draw: SampleConfig) -> dict[str, SamplingSession]:
    """What to draw, by folder; checkpoints are loaded and prompts encoded once."""
    session = prepare(draw)
    if config.size_px not in (None, *session.sizes_px):
        raise ConfigError(f"size_px: {config.size_px} px is not drawn; the stages draw {session.sizes_px}")
    if not config.guidance:
        return {"drawn": session}
    return {f"guidance-{w:g}": session.with_guidance(w, config.guidance_of) for w in config.guidance}


def _computes_metrics(draw: SampleConfig) -> bool:
    """Whether this process is to judge: of those that draw at the same time, the first."""
    return draw.part is not None or my_part(draw)[0] == 0


def _generated_images(root: Path, session: SamplingSession, config: EvaluateConfig) -> ImageSet:
    size = config.size_px or session.sizes_px[-1]
    files = [root / f"images-{size}" / image.name for image in session.images]
    return image_files(files, lambda: [image.prompt for image in session.images])


def _originals(session: SamplingSession, config: EvaluateConfig) -> ImageSet:
    """The store's images that the captions are of, in the size that is judged."""
    captions = session.config.captions
    assert isinstance(captions, StoreCaptions)
    samples = [image.caption.sample for image in session.images]
    assert None not in samples
    size = config.size_px or session.sizes_px[-1]
    return image_samples(captions.store, captions.path, size, cast(list[int], samples), "draw.captions")


def _opened(name: str, images: AnyImageSet | ImageSet | None) -> ImageSet | None:
    if images is None or isinstance(images, FeatureFiles):
        return None
    return images if isinstance(images, ImageSet) else images.open(name)


def _feature_set(
    name: str,
    images: AnyImageSet | ImageSet,
    config: EvaluateConfig,
    cache: FeatureCache,
    originals: ImageSet | None = None,
) -> FeatureSet:
    if isinstance(images, FeatureFiles):
        return read_set(images, name)
    opened = _opened(name, images)
    assert opened is not None
    if originals is not None and originals.count != opened.count:
        raise ConfigError(
            f"lpips: {opened.count} images in {name} and {originals.count} to compare them with; give as many"
        )
    clip = None if name == "reference" else config.clip
    return gather(name, opened, config.features, clip, cache, lpips=config.lpips, originals=originals)


def _fingerprints(config: EvaluateConfig) -> dict[str, object]:
    return {
        name: dict(model.fingerprint())
        for name, model in (("features", config.features), ("clip", config.clip), ("lpips", config.lpips))
        if model is not None
    }
