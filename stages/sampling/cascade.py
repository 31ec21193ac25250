"""Loads the trained stages of a cascade."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from imagen_core.cascade import Cascade, CascadeStage
from imagen_core.text_batch import each_encoder
from imagen_core.train import LoadedDenoiser, TrainError
from pipeline.errors import ConfigError
from stages.checkpoints.load import load_checkpoint_from, origin
from stages.encoders.identity import record_changes
from stages.sampling.config import GuideConfig, SampleStageConfig

_IMPORTED = 0
"""The step of a checkpoint of another system."""
_NUMBERS = ("dtype:", "fingerprint.compute_dtype:")
"""In which types embeddings were computed and stored: an import knows none, and says float32."""


@dataclass(frozen=True, slots=True)
class LoadedCascade:
    """A cascade and the checkpoints of its stages."""

    cascade: Cascade
    checkpoints: Sequence[LoadedDenoiser]
    guides: Sequence[LoadedDenoiser | None] = ()
    """Of each stage, if any has one."""

    @property
    def text_embed_encoder(self) -> Mapping[str, Any] | None:
        """Describes the encoder of captions as one vector that stages were trained on; None if none reads them."""
        return next((found for one in self.checkpoints if (found := one.embed_encoders.get("text_embed"))), None)

    @property
    def origins(self) -> list[dict[str, object]]:
        """Which checkpoint each stage is from."""
        pairs = zip_longest(self.checkpoints, self.guides)
        return [origin(stage) | ({} if guide is None else {"guide": origin(guide)}) for stage, guide in pairs]


def load_cascade(stages: Sequence[SampleStageConfig], last_px: int | None = None) -> LoadedCascade:
    """The cascade of these checkpoints, up to the stage of `last_px`; None means all stages.

    Raises:
        ConfigError: a checkpoint is missing, damaged, or was trained with another encoder than the others.
    """
    built: list[CascadeStage] = []
    checkpoints: list[LoadedDenoiser] = []
    guides: list[LoadedDenoiser | None] = []
    encoders: dict[str, Mapping[str, Any]] = {}
    several = False
    vectors: Mapping[str, Any] | None = None
    for number, stage in enumerate(stages):
        if last_px is not None and built and built[-1].size_px == last_px:
            break
        try:
            loaded = load_checkpoint_from(stage.checkpoint, stage.weights, stage.lora)
            loaded.stage  # noqa: B018 - refuses a prior
        except TrainError as error:
            raise ConfigError(f"stages.{number}.checkpoint: {error}") from error
        mine = loaded.embed_encoders.get("text_embed")
        tokens = each_encoder(loaded.encoder)
        several |= isinstance(loaded.encoder, list)
        # Of stages with one encoder each it must be the same; several are told apart by their names.
        pairs = [
            (encoders.get(one["name"]) if several else next(iter(encoders.values()), None), one) for one in tokens
        ]
        for before, now in (*pairs, (vectors, mine)):
            changes = [] if before is None or now is None else record_changes(before, now)
            if any(one.step == _IMPORTED for one in (*checkpoints, loaded)):
                changes = [change for change in changes if not change.startswith(_NUMBERS)]
            if changes:
                raise ConfigError(
                    f"stages.{number}.checkpoint: was trained with another encoder than the stage before it: "
                    f"{'; '.join(changes)}; take stages trained on one encoder"
                )
        vectors = vectors or mine
        for one in tokens:
            encoders.setdefault(one["name"], one)
        names = tuple(one["name"] for one in tokens)
        further = loaded.condition_images
        guide = None if stage.guide is None else _load_guide(stage.guide, loaded, f"stages.{number}.guide")
        model = None if guide is None else guide.denoiser
        built.append(
            CascadeStage(loaded.denoiser, stage.sampling, loaded.max_tokens, loaded.shapes, names, further, model)
        )
        checkpoints.append(loaded)
        guides.append(guide)
    if last_px not in (None, built[-1].size_px):
        sizes = [stage.size_px for stage in built]
        raise ConfigError(f"output.size_px: no stage generates {last_px} px; the stages generate {sizes}")
    try:
        every = list(encoders.values())
        return LoadedCascade(Cascade(built, every if several else next(iter(every), None)), checkpoints, guides)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _load_guide(config: GuideConfig, stage: LoadedDenoiser, option: str) -> LoadedDenoiser:
    """The guide of a stage, which reads the same embeddings as its model; the cascade checks the rest.

    Raises:
        ConfigError: it is missing, damaged, or was trained on others.
    """
    try:
        guide = load_checkpoint_from(config.checkpoint, config.weights, config.lora)
        guide.stage  # noqa: B018 - refuses a prior
    except TrainError as error:
        raise ConfigError(f"{option}.checkpoint: {error}") from error
    changes = [
        f"{name} {mine!r} -> {theirs!r}"
        for name, mine, theirs in (
            ("max_tokens", stage.max_tokens, guide.max_tokens),
            ("condition_images", dict(stage.condition_images), dict(guide.condition_images)),
        )
        if mine != theirs and (name != "max_tokens" or stage.encoder is not None)
    ]
    encoders = [*zip_longest(each_encoder(stage.encoder), each_encoder(guide.encoder))]
    names = sorted({*stage.embed_encoders, *guide.embed_encoders})
    encoders += [(stage.embed_encoders.get(name), guide.embed_encoders.get(name)) for name in names]
    for mine, theirs in encoders:
        if mine is None or theirs is None:
            changes.append(f"encoder {(mine or theirs or {})['name']} is read by one of the two alone")
        else:
            changes += record_changes(mine, theirs)
    if changes:
        raise ConfigError(
            f"{option}.checkpoint: does not read what the stage's model reads: {'; '.join(changes[:5])}; take a guide "
            "that was trained on the same embeddings"
        )
    return guide
