"""Which images to evaluate, and with which metrics."""

from typing import Literal

from pydantic import Field, model_validator

from imagen_core.config import default_field
from imagen_core.train.averages.power import LONGEST
from pipeline.config import Config
from stages.evaluation.features.clip import ClipFeatures
from stages.evaluation.features.image_sets import AnyImageSet, FeatureFiles
from stages.evaluation.features.lpips import LpipsDistance
from stages.evaluation.features.registry import AnyFeatures
from stages.sampling.caption_sets import StoreCaptions
from stages.sampling.config import SampleConfig


class KernelConfig(Config):
    """The kernel distance."""

    num_subsets: int = Field(default=100, ge=1)
    """Subsets over which its mean and deviation are taken."""
    subset_size: int = Field(default=1000, ge=2)
    """Images per subset, generated as well as reference ones."""
    seed: int = Field(default=0, ge=0)
    """Decides the subsets."""


class EvaluateConfig(Config):
    """Which images to evaluate, and with which metrics."""

    sample: SampleConfig | None = None
    """Images to generate and evaluate: the keys of `pipeline run sample`. null: evaluate `generated`."""
    guidance: tuple[float, ...] = ()
    """Weights of captions, labels and image embeddings to compare; each gets its own folder of images. Empty: as
    `sample.stages` say."""
    guidance_of: Literal["all", "first"] = "all"
    """The stages that `guidance` and `autoguidance` are for: all, or only the first, as in the figures of Imagen."""
    autoguidance: tuple[float, ...] = default_field(())
    """Weights of stages against their `guide` to compare; empty: as `sample.stages` say."""
    sigma_rel: tuple[float, ...] = default_field(())
    """Lengths of the averages of the weights to compare, which are rebuilt from a training's snapshots; empty: the
    weights that `sample.stages` name. Of several sweeps all combinations are made."""
    sigma_rel_of: Literal["all", "first"] = default_field("all")
    """The stages whose averages `sigma_rel` is for: all, or only the first."""
    size_px: int | None = Field(default=None, ge=1)
    """Which of the generated sizes to evaluate; null: the last stage's."""
    generated: AnyImageSet | None = None
    """Existing images, or their features."""
    reference: AnyImageSet | None = None
    """Real images, or their features, for the distances."""
    features: AnyFeatures | None = None
    """Model whose features the distances compare."""
    clip: ClipFeatures | None = None
    """Model of the CLIP score."""
    lpips: LpipsDistance | None = None
    """Distance of each image to the one it should look like: of sampled images to the store's images of their captions
    (sample.captions.kind=store), of existing images to those of `reference`, in their order."""
    kernel: KernelConfig = KernelConfig()
    """The kernel distance."""
    num_neighbours: int = Field(default=0, ge=0)
    """Neighbours for precision and recall, usually 3. 0 leaves both out, as their time grows with the square of the
    number of images."""
    num_splits: int = Field(default=10, ge=1)
    """Splits of the Inception score."""

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        if (self.sample is None) == (self.generated is None):
            raise ValueError("give one of sample and generated")
        for name in ("guidance", "autoguidance", "sigma_rel"):
            values = getattr(self, name)
            if self.sample is None and values:
                raise ValueError(f"{name} is for images to generate; give sample, or leave {name} out")
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: each value once (got {list(values)})")
        for sigma_rel in self.sigma_rel:
            if not 0 < sigma_rel <= LONGEST:
                raise ValueError(f"sigma_rel: each must be above 0 and at most {LONGEST} (got {sigma_rel:g})")
        without_features = [
            name
            for name, images in (("generated", self.generated or self.sample), ("reference", self.reference))
            if images is not None and not isinstance(images, FeatureFiles)
        ]
        if self.reference is not None and without_features and self.features is None and self.lpips is None:
            raise ValueError(
                f"features: needed to extract features of the images of {without_features[0]}; "
                "give features={kind: clip, model: openai/clip-vit-large-patch14}, or a local folder"
            )
        if self.clip is not None and self.clip.output != "projected":
            raise ValueError(f"clip.output: the CLIP score needs projected (got {self.clip.output})")
        if self.lpips is not None:
            self._check_pairs()
        if self.clip is not None and isinstance(self.generated, FeatureFiles):
            raise ValueError(
                "clip: generated is a file of features, so there are no images to read; give "
                "generated.clip_images and generated.clip_texts, and clip=null"
            )
        return self

    def _check_pairs(self) -> None:
        """Refuses images without others to compare them with."""
        if self.sample is not None:
            if not isinstance(self.sample.captions, StoreCaptions):
                raise ValueError("lpips: sampled images are compared with a store's; give sample.captions.kind=store")
        elif self.reference is None or isinstance(self.generated, FeatureFiles | None):
            raise ValueError("lpips: needs images in generated and as many in reference, in the same order")
        elif isinstance(self.reference, FeatureFiles):
            raise ValueError("lpips: reference is a file of features; give images")
