"""The settings that an evaluation compares: each has its own folder of images, and its own row of the table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from imagen_core.cascade import Cascade
from imagen_core.train.averages.power import power_name
from pipeline.errors import ConfigError
from stages.evaluation.config import EvaluateConfig
from stages.sampling.config import SampleConfig, SampleStageConfig

_SWEPT = frozenset({"text", "labels", "image_embed"})
Of = Literal["all", "first"]


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One combination of the values that are compared; None: as the sampling says."""

    sigma_rel: float | None
    sigma_rel_of: Of
    guidance: float | None
    autoguidance: float | None

    @property
    def values(self) -> Mapping[str, float]:
        """The values that are compared, by name."""
        found = {"sigma_rel": self.sigma_rel, "guidance": self.guidance, "autoguidance": self.autoguidance}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def name(self) -> str:
        """Of its folder and row."""
        return "-".join(f"{name}-{value:g}" for name, value in self.values.items()) or "generated"

    def with_weights(self, sample: SampleConfig) -> SampleConfig:
        """The sampling with the averages of this length."""
        if self.sigma_rel is None:
            return sample
        weights = {"weights": power_name(self.sigma_rel)}
        changed = len(sample.stages) if self.sigma_rel_of == "all" else 1
        stages = [stage.model_copy(update=weights) for stage in sample.stages[:changed]]
        return sample.model_copy(update={"stages": (*stages, *sample.stages[changed:])})

    def with_guidance(self, sample: SampleConfig, cascade: Cascade, of: Of) -> SampleConfig:
        """The sampling with all values of this point.

        Raises:
            ConfigError: no stage has the conditions, or a guide, that a weight is for.
        """
        sample = self.with_weights(sample)
        stages: Sequence[SampleStageConfig] = sample.stages
        if self.guidance is not None:
            stages = with_guidance(stages, cascade, self.guidance, of)
        if self.autoguidance is not None:
            stages = with_autoguidance(stages, cascade, self.autoguidance, of)
        return sample.model_copy(update={"stages": tuple(stages)})


def sweep(config: EvaluateConfig) -> list[SweepPoint]:
    """Every combination of the lengths of averages and weights of guidance to compare; at least one."""
    values = product(config.sigma_rel or (None,), config.guidance or (None,), config.autoguidance or (None,))
    return [SweepPoint(sigma_rel, config.sigma_rel_of, guidance, auto) for sigma_rel, guidance, auto in values]


def with_guidance(
    stages: Sequence[SampleStageConfig], cascade: Cascade, weight: float, of: Literal["all", "first"]
) -> tuple[SampleStageConfig, ...]:
    """The stages with another weight of captions, labels and image embeddings: `all` that read them, or the `first`.

    Raises:
        ConfigError: no stage reads any of them.
    """
    chosen = cascade.stages if of == "all" else cascade.stages[:1]
    if not any(stage.conditions & _SWEPT for stage in chosen):
        raise ConfigError("guidance: no stage reads captions, labels or image embeddings; leave it out")
    changed = list(stages)
    for number, stage in enumerate(chosen):
        sampling = changed[number].sampling
        guidance = sampling.guidance.model_copy(update=dict.fromkeys(_SWEPT & stage.conditions, weight))
        sampling = sampling.model_copy(update={"guidance": guidance})
        changed[number] = changed[number].model_copy(update={"sampling": sampling})
    return tuple(changed)


def with_autoguidance(
    stages: Sequence[SampleStageConfig], cascade: Cascade, weight: float, of: Of
) -> tuple[SampleStageConfig, ...]:
    """The stages with another weight against their guides: `all` that have one, or the `first`.

    Raises:
        ConfigError: none has a guide.
    """
    changed, found = list(stages), False
    for number, stage in enumerate(cascade.stages if of == "all" else cascade.stages[:1]):
        if stage.guide is not None:
            sampling, found = changed[number].sampling, True
            guidance = sampling.guidance.model_copy(update={"autoguidance": weight})
            sampling = sampling.model_copy(update={"guidance": guidance})
            changed[number] = changed[number].model_copy(update={"sampling": sampling})
    if not found:
        raise ConfigError("autoguidance: no stage has a guide; name one as sample.stages.0.guide, or leave it out")
    return tuple(changed)
