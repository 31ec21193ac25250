"""All metrics that can be computed from the available features."""

from collections.abc import Mapping

from imagen_core.evaluation import clip_score, frechet_distance, inception_score, kernel_distance, precision_recall
from pipeline.errors import ConfigError
from pipeline.fingerprint import differences
from stages.evaluation.config import EvaluateConfig
from stages.evaluation.features.gather import FeatureSet

_NAMES = ("model", "revision")
"""What a model is called; its weights and settings have fields of their own."""


def compute_metrics(
    generated: FeatureSet, reference: FeatureSet | None, config: EvaluateConfig
) -> Mapping[str, object]:
    """One row of the table, with the metrics that can be computed.

    Raises:
        ConfigError: features that do not fit together, or no metric can be computed.
    """
    if reference is not None:
        _check_same_model(generated, reference)
    try:
        row = {**_distances(generated, reference, config), **_scores(generated, config)}
    except ValueError as error:
        raise ConfigError(f"generated and reference: {error}") from error
    if not row:
        raise ConfigError(
            "no metric can be computed: give reference and features (distances), clip and captions (CLIP score), "
            "lpips, or logits (Inception score)"
        )
    return {**row, **generated.counts}


def _check_same_model(generated: FeatureSet, reference: FeatureSet) -> None:
    """Raises ConfigError if the features are known to be of different models, or of other settings of one."""
    labels = {generated.label, reference.label} - {None}
    if len(labels) > 1:
        raise ConfigError(
            f"features of different models: {' and '.join(sorted(map(str, labels)))}; take generated and reference "
            "from one"
        )
    if generated.model is None or reference.model is None:
        return
    models = (reference.model, generated.model)
    mine, other = ({k: v for k, v in model.items() if k not in _NAMES} for model in models)
    if changes := differences(mine, other):
        raise ConfigError(
            f"features of one model with different settings, in reference -> in generated: {'; '.join(changes[:5])}; "
            "extract both with the same"
        )


def _distances(generated: FeatureSet, reference: FeatureSet | None, config: EvaluateConfig) -> dict[str, object]:
    if reference is None or reference.features is None or generated.features is None:
        return {}
    frechet = frechet_distance(generated.moments, reference.moments)
    kernel = kernel_distance(generated.features, reference.features, **config.kernel.model_dump())
    row: dict[str, object] = {
        "images": generated.moments.count,
        "reference_images": reference.moments.count,
        "frechet_distance": frechet.distance,
        "frechet_mean_term": frechet.mean_term,
        "kernel_distance": kernel.mean,
        "kernel_subset_size": kernel.subset_size,
    }
    if kernel.std is not None:
        row["kernel_distance_std"] = kernel.std
    if frechet.warning is not None:
        row["warning"] = frechet.warning
    if config.num_neighbours:
        found = precision_recall(generated.features, reference.features, num_neighbours=config.num_neighbours)
        row.update(precision=found.precision, recall=found.recall)
    return row


def _scores(generated: FeatureSet, config: EvaluateConfig) -> dict[str, object]:
    row: dict[str, object] = {}
    if generated.clip_images is not None and generated.clip_texts is not None:
        clip = clip_score(generated.clip_images, generated.clip_texts)
        row.update(images=len(generated.clip_images), clip_score=clip.mean, clip_score_error=clip.standard_error)
    if generated.lpips is not None:
        error = generated.lpips.std() / len(generated.lpips) ** 0.5
        row.update(images=len(generated.lpips), lpips=float(generated.lpips.mean()), lpips_error=float(error))
    if generated.logits is not None:
        inception = inception_score(generated.logits, num_splits=config.num_splits)
        row.update(images=len(generated.logits), inception_score=inception.mean, inception_score_std=inception.std)
    return row
