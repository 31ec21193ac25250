"""What a stage of another package is that adds arrays to a store: scores, masks, latents."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import numpy as np

from imagen_core.store import ArraySpec, Group, Sample
from pipeline.config import Config
from pipeline.stage import Resources
from stages.filters.base import Rejection

MakeArrays = Callable[[Iterable[Sample]], Iterable[Mapping[str, np.ndarray] | Rejection]]
"""Takes the samples of a shard one after another and yields for each, in their order, its arrays by name; a number is
an array without axes, such as `np.float32(1)`. Or why it has none: the sample is then excluded from the store, and
counted as a drop."""


class StageConfig(Config):
    """An entry of `stages`."""

    kind: str

    @abstractmethod
    def stages(self, caption_sets: Sequence[str]) -> "Sequence[ArrayStageConfig]":
        """The stages that it stands for.

        Args:
            caption_sets: that the store will have, that of `samples` first.
        Raises:
            ValueError: there is no such stage.
        """


class ArrayStageConfig(StageConfig):
    """One stage. Its configuration is part of the fingerprint of its groups, `array-NAME` for each array."""

    version: ClassVar[int] = 1
    """Raised when the code changes what it makes of the same configuration and samples."""
    machine_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that change where and how fast it runs, but not the arrays."""

    @abstractmethod
    def arrays(self) -> Mapping[str, ArraySpec]:
        """Dtype and shape of each array, by name; a name may come from a field, so that a stage can be used twice."""

    @abstractmethod
    def build(self) -> MakeArrays:
        """What makes the arrays, with its models loaded; called once in each process that works for the stage.

        What it makes of a sample must depend on the configuration and that sample alone.

        Raises:
            PipelineError: no shard can succeed (model files or a package are missing); ends the run.
        """

    def stages(self, caption_sets: Sequence[str]) -> "Sequence[ArrayStageConfig]":
        return (self,)

    def reads(self) -> tuple[str, ...]:
        """Groups of the store that the samples shall have beside their captions and metadata, such as `images-64`,
        `text-t5`, `captions-long` and `text-t5-long` of a further set of captions, or an `array-NAME` of an earlier
        stage."""
        return ()

    def check(self, groups: Mapping[str, Group]) -> None:
        """Called before the run with the groups that it reads, by name.

        Raises:
            ValueError: they are not what it needs.
        """
        return

    def fingerprint(self) -> dict[str, object]:
        """Everything that decides the arrays, as JSON. A stage with a model adds a digest of its weights."""
        settings = self.model_dump(mode="json", exclude={"kind", *self.machine_fields})
        return {"kind": self.kind, "version": self.version, **settings}

    def resources(self) -> Resources:
        """What a task or worker occupies."""
        return Resources()

    def workers(self) -> int | None:
        """None: tasks in the processes that all stages share. A number: workers of its own, as for a model on a GPU; 0
        means one for each GPU."""
        return None
