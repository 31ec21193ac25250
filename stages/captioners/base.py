"""What a captioner is: its settings, what it is asked, and what it answers."""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self

from PIL import Image
from pydantic import Field, field_validator

from pipeline.config import Config
from pipeline.resources import Resources
from stages.captioners.budget import Used
from stages.captioners.checks import ChecksConfig
from stages.captioners.prompt import parse_prompt

_MOST_ATTEMPTS = 10_000


@dataclass(frozen=True, slots=True)
class Question:
    """One request for a caption."""

    row: int
    """Of the shard."""
    attempt: int
    """From 0."""
    seed: int
    prompt: str
    image: Image.Image
    """RGB, not larger than `image_px`."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for a question."""

    text: str = ""
    finish_reason: str | None = None
    """`stop`: the model ended the caption; `length`: it was cut at max_tokens."""
    tokens_in: int = 0
    tokens_out: int = 0
    problem: tuple[str, str] | None = None
    """Reason and detail, where there is no caption to check, and another seed would change nothing."""


NextQuestion = Callable[[], Question | None]
"""The next question; None if there is none now, and there may be one again after an answer."""


class Captioner(Protocol):
    """A captioner at work, in a worker."""

    identity: Mapping[str, Any]
    """What was found out about the model by loading it or asking it; JSON."""

    def answers(self, next_question: NextQuestion) -> Iterator[tuple[Question, Answer]]:
        """Answers questions in any order, several at once. It asks for the next one when it has room for it, and ends
        when there is none and all are answered. Several threads may call it at the same time.

        Raises:
            PipelineError: no question can be answered; every answer that came is given first.
        """
        ...


class CaptionerConfig(Config):
    """Settings of a captioner, whatever its kind. It makes a set of captions of its name."""

    machine_fields: ClassVar[frozenset[str]] = frozenset(("name", "weight"))
    """Fields that are no part of the fingerprint of its captions."""
    version: ClassVar[int] = 1
    """Raised when the code changes what it makes of the same configuration and samples."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Names the set of captions."""
    kind: str
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """How often training takes a caption of this set, as of the sets of `source.captions`. The captions of a source
    without sets have 1."""
    on_bad: Literal["keep_sample", "drop"] = "keep_sample"
    """What becomes of a sample without a good caption: it stays with its other captions, or is dropped from the
    store."""

    @property
    def called(self) -> str:
        """The set's name."""
        return self.name

    def made_by(self) -> dict[str, Any]:
        """Everything in the configuration that decides the captions; for the fingerprint and the manifest."""
        settings = self.model_dump(mode="json", exclude=set(self.machine_fields))
        return {"version": self.version, **settings}


class ModelCaptionerConfig(CaptionerConfig):
    """Settings of a captioner that looks at the images."""

    prompt: str = Field(min_length=1)
    """What the model is asked about each image. `{caption}` stands for the sample's first caption; `{key}`, `{url}`,
    `{width}`, `{height}`, `{transcription}`, `{label}` and the kept columns of the source for theirs. They are filled
    in as text. A brace that is text is written twice."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer in tokens."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """0: the likeliest tokens."""
    image_px: int = Field(default=768, ge=16)
    """Longer side of the image that the model sees; larger originals are made smaller, smaller ones stay."""
    attempts: int = Field(default=2, ge=1)
    """How often an image is asked about, each time with another seed, until the caption passes the checks. With
    temperature 0 most servers answer the same again; a model of kind transformers always does, and is asked once."""
    seed: int = Field(default=0, ge=0)
    """The seed of each request follows from this, the sample's key and the number of the attempt."""
    checks: ChecksConfig = ChecksConfig()
    """What makes a caption bad."""

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        parse_prompt(prompt)
        return prompt

    @abstractmethod
    def start(self, usage: Callable[[], Used]) -> Captioner:
        """Loads the model, or finds the server; called once in each worker.

        Args:
            usage: counts what earlier runs of the folder have used.
        Raises:
            PipelineError: there is none, or it does not let us in; ends the run.
        """

    def worker_count(self) -> int:
        """Workers that keep it; 0 means one for each GPU."""
        return 1

    def occupies(self) -> Resources:
        """What a worker occupies."""
        return Resources(num_cpus=0.5)

    def pinned(self) -> Self:
        """The same model for any worker, also on another node or later."""
        return self

    @property
    def is_repeatable(self) -> bool:
        """Whether the model answers a question the same whatever the seed, so that it is asked once."""
        return False

    def modules(self) -> tuple[str, ...]:
        """Large modules that it imports; see `Stage.modules`."""
        return ()


def question_seed(seed: int, key: str, attempt: int) -> int:
    """The seed of a request, 0 to 2**31 - 1."""
    digest = hashlib.sha256(f"{seed}\n{attempt}\n{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def attempt_of(seed: int, key: str, request_seed: int) -> int | None:
    """The attempt whose request had a seed, from 0; None if none of the first 10,000 had it, as after an erasure."""
    return next((n for n in range(_MOST_ATTEMPTS) if question_seed(seed, key, n) == request_seed), None)


def fitted(image: Image.Image, image_px: int) -> Image.Image:
    """The image with its longer side at most `image_px`."""
    longer = max(image.size)
    if longer <= image_px:
        return image
    width, height = (max(1, round(side * image_px / longer)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
