"""What to judge, and by what."""

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
    """Images of each subset, of either side."""
    seed: int = Field(default=0, ge=0)
    """Decides the subsets."""


class EvaluateConfig(Config):
    """What to judge, and by what."""

    draw: SampleConfig | None = None
    """Images to draw and judge: the keys of `pipeline run sample`. null: judge `generated`."""
    guidance: tuple[float, ...] = ()
    """Weights of the caption, and of image embeddings, to compare, each drawn into a folder of its own; empty: as
    `draw.stages` say."""
    guidance_of: Literal["all", "first"] = "all"
    """The stages that `guidance` is for: all, or only the first, as in the figures of Imagen."""
    size_px: int | None = Field(default=None, ge=1)
    """Which of the drawn sizes to judge; null: the last stage's."""
    generated: AnyImageSet | None = None
    """Images, or their features, that are there already."""
    reference: AnyImageSet | None = None
    """Real images, or their features, for the distances."""
    features: AnyFeatures | None = None
    """Model whose features the distances are of."""
    clip: ClipFeatures | None = None
    """Model of the CLIP score."""
    lpips: LpipsDistance | None = None
    """Distance of each image to the one it should look like: of drawn ones to the store's image the caption is of
    (draw.captions.kind=store), of given ones to those of `reference`, in their order."""
    kernel: KernelConfig = KernelConfig()
    """The kernel distance."""
    num_neighbours: int = Field(default=0, ge=0)
    """Neighbours for precision and recall, usually 3; 0: leave them out, as they take time with the square of the
    images."""
    num_splits: int = Field(default=10, ge=1)
    """Splits of the Inception score."""

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        if (self.draw is None) == (self.generated is None):
            raise ValueError("give one of draw and generated")
        if self.draw is None and self.guidance:
            raise ValueError("guidance is for images to draw; give draw, or leave guidance out")
        if len(set(self.guidance)) < len(self.guidance):
            raise ValueError(f"guidance: each weight once (got {list(self.guidance)})")
        looked_at = [
            name
            for name, images in (("generated", self.generated or self.draw), ("reference", self.reference))
            if images is not None and not isinstance(images, FeatureFiles)
        ]
        if self.reference is not None and looked_at and self.features is None and self.lpips is None:
            raise ValueError(
                f"features: needed to look at the images of {looked_at[0]}; "
                "give features={kind: clip, model: openai/clip-vit-large-patch14}, or a local folder"
            )
        if self.clip is not None and self.clip.output != "projected":
            raise ValueError(f"clip.output: the CLIP score needs projected (got {self.clip.output})")
        if self.lpips is not None:
            self._check_pairs()
        if self.clip is not None and isinstance(self.generated, FeatureFiles):
            raise ValueError(
                "clip: generated is a file of features, so there are no images to look at; give "
                "generated.clip_images and generated.clip_texts, and clip=null"
            )
        return self

    def _check_pairs(self) -> None:
        """Refuses images without others to compare them with."""
        if self.draw is not None:
            if not isinstance(self.draw.captions, StoreCaptions):
                raise ValueError("lpips: drawn images are compared with a store's; give draw.captions.kind=store")
        elif self.reference is None or isinstance(self.generated, FeatureFiles | None):
            raise ValueError("lpips: needs images in generated and as many in reference, in the same order")
        elif isinstance(self.reference, FeatureFiles):
            raise ValueError("lpips: reference is a file of features; give images")
