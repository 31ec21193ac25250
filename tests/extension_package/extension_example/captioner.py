"""A captioner that names the colour of an image."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from stages.captioners.base import Answer, ModelCaptionerConfig, NextQuestion, Question
from stages.captioners.budget import Used


class ColorNames(ModelCaptionerConfig):
    """Answers the prompt with the name of the brightest channel."""

    kind: Literal["color_names"] = "color_names"
    names: tuple[str, str, str] = ("red", "green", "blue")
    """Of the channels."""

    def start(self, usage: Callable[[], Used]) -> "ColorNamer":
        return ColorNamer(self.names)


class ColorNamer:
    """A captioner with a model loads it here, and answers several questions at a time."""

    def __init__(self, names: tuple[str, str, str]):
        self.names = names
        self.identity: Mapping[str, Any] = {}

    def answers(self, next_question: NextQuestion) -> Iterator[tuple[Question, Answer]]:
        while (question := next_question()) is not None:
            channel = np.asarray(question.image).mean(axis=(0, 1)).argmax()
            yield question, Answer(f"{question.prompt} {self.names[channel]}", "stop")
