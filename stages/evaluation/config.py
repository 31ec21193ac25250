"""Which images to evaluate, and with which metrics."""

from typing import Literal

from pydantic import Field, model_validator

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
    """The stages that `guidance` is for: all, or only the first, as in the figures of Imagen."""
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
        if self.sample is None and self.guidance:
            raise ValueError("guidance is for images to generate; give sample, or leave guidance out")
        if len(set(self.guidance)) < len(self.guidance):
            raise ValueError(f"guidance: each weight once (got {list(self.guidance)})")
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
