"""Evaluates images: samples them first if the configuration says so, with one guidance weight or several."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.job import Job
from stages.evaluation.checks import Opened, check_models, check_sets, expected_images, opened
from stages.evaluation.config import EvaluateConfig
from stages.evaluation.features.gather import FeatureCache, FeatureSet, gather
from stages.evaluation.features.image_sets import ImageSet, image_files, image_samples
from stages.evaluation.metrics import compute_metrics
from stages.evaluation.report import write_report
from stages.evaluation.sweep import sweep
from stages.sampling.caption_sets import StoreCaptions
from stages.sampling.config import SampleConfig, SampleStageConfig
from stages.sampling.outputs import ImageFolder
from stages.sampling.requests import ImageRequest, process_share
from stages.sampling.run import claim_folder, prepare, sample_into
from stages.sampling.session import SamplingSession


def evaluate(config: EvaluateConfig, job: Job) -> Mapping[str, object]:
    """Samples what is missing, then writes `results.json`, `results.md` and, for several weights, a plot.

    Images are in `generated/`, or in one folder such as `guidance-WEIGHT/` per point of a sweep, as `pipeline run
    sample` writes them; features are kept in `features/`. Of several processes all sample, and the first one computes
    the metrics once all images are there.

    Raises:
        ConfigError: unusable settings, images or checkpoints.
        StaleOutputError: a folder holds images of other settings.
        MachineError: a model cannot be found.
    """
    with job.working_folder() as root:
        return _evaluate(config, job, root)


def _evaluate(config: EvaluateConfig, job: Job, root: Path) -> Mapping[str, object]:
    computes = config.sample is None or _computes_metrics(config.sample)
    fingerprints = check_models(config)
    reference = None if config.reference is None or not computes else opened("reference", config.reference)
    summary: dict[str, object] = {}
    if config.sample is not None:
        sets, originals, summary = _sample(config, config.sample, job, root, reference)
        if summary["missing"] or job.should_stop() or not computes:
            return summary
    else:
        assert config.generated is not None
        sets = {"generated": opened("generated", config.generated)}
        originals = reference if config.lpips is not None and isinstance(reference, ImageSet) else None
        check_sets(config, sets, reference, originals)
    cache = FeatureCache(root / "features")
    compared = None if reference is None else _features("reference", reference, config, cache)
    rows: list[Mapping[str, object]] = []
    features, settings = None, sweep(config)
    for number, (name, images) in enumerate(sets.items()):
        if job.should_stop():
            return summary
        job.lines.show(f"{name}: features")
        features = _features(name, images, config, cache, originals)
        swept = settings[number].values if config.sample is not None else {}
        rows.append({"name": name, **swept, **compute_metrics(features, compared, config)})
    label = next((s.label for s in (features, compared) if s is not None and s.label is not None), None)
    clip = None if config.clip is None else config.clip.label
    job.check()
    results = {"features_model": label, "clip_model": clip, "fingerprints": fingerprints, "rows": rows}
    return {**summary, **results, "files": write_report(root, results)}


def _sample(
    config: EvaluateConfig, sample: SampleConfig, job: Job, root: Path, reference: Opened | None
) -> tuple[Mapping[str, Opened], ImageSet | None, dict[str, object]]:
    """Samples into a folder per point of the sweep, or into one; prompts are encoded once, and checkpoints loaded once
    but for lengths of averages.

    All folders, and whether the metrics can be computed, are checked before the first image.

    Returns:
        The images by name, if none is missing; what LPIPS compares them with; and the summary.
    """
    points, last_px = sweep(config), sample.output.size_px
    sample = points[0].with_weights(sample)
    requests, session = prepare(sample)
    sizes = sample.output.written_px(session.cascade.sizes_px)
    if config.size_px not in (None, *sizes):
        raise ConfigError(f"size_px: no images of {config.size_px} px are generated; the stages generate {sizes}")
    size = config.size_px or sizes[-1]
    settings = {each.name: each.with_guidance(sample, session.cascade, config.guidance_of) for each in points}
    originals = None
    if config.lpips is not None:
        assert isinstance(sample.captions, StoreCaptions)
        originals = _originals(sample.captions, requests, size)
    check_sets(config, dict.fromkeys(settings, expected_images(requests, session.cascade, size)), reference, originals)
    folders = {name: ImageFolder(root / name, requests, sizes) for name in settings}
    loaded = _Loaded(session, sample.stages, last_px)
    for name, each in settings.items():
        claim_folder(folders[name], each, loaded.of(each.stages), job, name)
    summaries = {
        name: sample_into(folders[name], each, loaded.of(each.stages), job, name) for name, each in settings.items()
    }
    missing = sum(len(folder.missing()) for folder in folders.values())
    sets = {} if missing else {name: _generated_images(folder, size) for name, folder in folders.items()}
    return sets, originals, {"sampled": summaries, "missing": missing}


class _Loaded:
    """The session with the weights of some stages; those of one point of the sweep at a time."""

    def __init__(self, session: SamplingSession, stages: Sequence[SampleStageConfig], last_px: int | None):
        self._session, self._last_px = session, last_px
        self._weights = [stage.weights for stage in stages]

    def of(self, stages: Sequence[SampleStageConfig]) -> SamplingSession:
        """The session that samples as these stages say."""
        weights = [stage.weights for stage in stages]
        if weights != self._weights:
            self._session, self._weights = self._session.with_weights(stages, self._last_px), weights
        return self._session.with_stages(stages)


def _computes_metrics(sample: SampleConfig) -> bool:
    """Whether this process computes the metrics: of those that sample at the same time, the first."""
    return sample.part is not None or process_share(sample.part)[0] == 0


def _generated_images(folder: ImageFolder, size_px: int) -> ImageSet:
    files = [folder.path(request, size_px) for request in folder.requests]
    return image_files(files, lambda: [request.prompt for request in folder.requests])


def _originals(captions: StoreCaptions, requests: Sequence[ImageRequest], size_px: int) -> ImageSet:
    """The store's images of the captions."""
    samples = [request.caption.sample for request in requests if request.caption.sample is not None]
    assert len(samples) == len(requests)
    return image_samples(captions.store, captions.path, size_px, samples, "sample.captions")


def _features(
    name: str, images: Opened, config: EvaluateConfig, cache: FeatureCache, originals: ImageSet | None = None
) -> FeatureSet:
    if isinstance(images, FeatureSet):
        return images
    clip = None if name == "reference" else config.clip
    return gather(name, images, config.features, clip, cache, lpips=config.lpips, originals=originals)
