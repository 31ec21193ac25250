"""Runs an image-text model of transformers, so that a caption depends on its own image, prompt and seed alone."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, MachineError, first_line
from stages.captioners.base import Answer, NextQuestion, Question
from stages.captioners.prompt import parse_prompt
from stages.captioners.transformers import TransformersCaptionerConfig
from stages.encoders.batches.memory import run_batches
from stages.encoders.loading import load_weights, place

if TYPE_CHECKING:
    from torch import Tensor

_REFUSED = "request_refused"


class GeneratingCaptioner:
    """See `Captioner`. Several threads may prepare images; one at a time has the model."""

    def __init__(self, config: TransformersCaptionerConfig):
        """Loads the model.

        Raises:
            ConfigError: it is not made for chats about images, or the prompt holds one of its control tokens.
            MachineError: its files are missing or damaged.
        """
        import torch
        import transformers

        self.config = config
        self._device, dtype = place(config, config.threads())
        self.processor, self.model = self._load(dtype)
        self._image_token = str(getattr(self.processor, "image_token", None) or "")
        self.tokenizer: Any = getattr(self.processor, "tokenizer", None)
        self._check_kind()
        self._control = _control_tokens(self.tokenizer, self._image_token)
        own_text = "\n".join(before for before, _ in parse_prompt(config.prompt))
        if token := self._control_token(own_text):
            raise ConfigError(
                f"captioners.{config.name}.prompt: {token!r} is a control token of {config.model}, whose chat "
                "template adds those that it needs; leave it out"
            )
        self.tokenizer.padding_side = "left"  # else every shorter row of a batch is another one
        settings = self.model.generation_config
        ends = settings.eos_token_id if settings.eos_token_id is not None else self.tokenizer.eos_token_id
        self._ends = [ends] if isinstance(ends, int) else list(ends or ())
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._batch_size = 1 if config.temperature > 0 else config.batch_size
        self._lock = threading.Lock()
        self.identity: Mapping[str, Any] = {"transformers": transformers.__version__, "torch": str(torch.__version__)}

    def _load(self, dtype: Any) -> tuple[Any, Any]:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        config, files = self.config, self.config.files()
        try:
            processor = AutoProcessor.from_pretrained(
                files.model, revision=files.revision or "main", trust_remote_code=False
            )
            return processor, load_weights(AutoModelForImageTextToText, files, dtype, self._device)
        except (ConfigError, MachineError) as error:
            raise config.named(error) from error
        except Exception as error:
            raise MachineError(
                f"captioners.{config.name}.model: {config.model} cannot be loaded: {first_line(error)}; give a model "
                "that AutoModelForImageTextToText and AutoProcessor of transformers load"
            ) from error

    def _check_kind(self) -> None:
        missing = ""
        if not getattr(self.processor, "chat_template", None) or self.tokenizer is None:
            missing = "has no processor with a chat template"
        elif self.model.config.is_encoder_decoder:
            missing = "is an encoder with a decoder, which does not go on from a prompt"
        elif not self._image_token or self.text("").count(self._image_token) != 1:
            missing = "has a chat template that does not show one image by the processor's image_token"
        if missing:
            raise ConfigError(
                f"captioners.{self.config.name}.model: {self.config.model} {missing}; give a model that is made for "
                "chats about images, or serve it and use kind: openai"
            )

    def answers(self, next_question: NextQuestion) -> Iterator[tuple[Question, Answer]]:
        while True:
            batch: list[Question] = []
            while len(batch) < self._batch_size and (question := next_question()) is not None:
                batch.append(question)
            if not batch:
                return
            yield from zip(batch, self.caption(batch), strict=True)

    def caption(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers some questions, in batches that fit into memory, each as if it were alone up to rounding.

        Raises:
            MemoryError: not even one fits.
        """
        texts = [self.text(question.prompt) for question in questions]
        found: dict[int, Answer] = {}
        for row, (question, text) in enumerate(zip(questions, texts, strict=True)):
            if token := self._control_token(question.prompt):
                found[row] = Answer(problem=(_REFUSED, f"{token} stands in the prompt"))
            elif (count := text.count(self._image_token)) != 1:
                found[row] = Answer(problem=(_REFUSED, f"{count} images in the prompt"))
        batches = run_batches(
            [row for row in range(len(questions)) if row not in found],
            self._batch_size,
            lambda rows, size: [list(rows[i : i + size]) for i in range(0, len(rows), size)],
            lambda rows: self._batch([texts[row] for row in rows], [questions[row] for row in rows]),
        )
        self._batch_size = min(self._batch_size, batches.limit)
        for rows, answers in batches.results:
            found.update(zip(rows, answers, strict=True))
        return [found[row] for row in range(len(questions))]

    def text(self, prompt: str) -> str:
        """The prompt within the model's chat template, up to where the answer begins."""
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def _control_token(self, prompt: str) -> str:
        """A control token in a prompt, which would be read as more than text; "" if there is none."""
        return next((token for token in self._control if token in prompt), "")

    def _batch(self, texts: Sequence[str], questions: Sequence[Question]) -> list[Answer]:
        config = self.config
        try:
            inputs = self.processor(
                text=list(texts),
                images=[[question.image] for question in questions],
                padding=True,
                return_tensors="pt",
                add_special_tokens=not _begins_specially(texts[0], self.tokenizer),
            )
            lengths = [int(length) for length in inputs["attention_mask"].sum(1)]
            if self._positions is not None and max(lengths) + config.max_tokens > self._positions:
                raise ValueError(
                    f"{max(lengths)} tokens of prompt and image, and max_tokens={config.max_tokens}, are more than "
                    f"the model's {self._positions}"
                )
        except ValueError as error:  # also an image of a shape that the model does not take
            if len(texts) > 1:
                return [self._batch([text], [q])[0] for text, q in zip(texts, questions, strict=True)]
            return [Answer(problem=(_REFUSED, first_line(error)))]
        if not bool(inputs["attention_mask"][:, -1].all()):
            raise MachineError(
                f"captioners.{config.name}.model: {config.model} pads on the right whatever it is told, so a caption "
                "would depend on its batch; set batch_size to 1"
            )
        made = self._generate(inputs, questions[0].seed)
        return [self._answer(tokens, length) for tokens, length in zip(made, lengths, strict=True)]

    def _generate(self, inputs: Mapping[str, Any], seed: int) -> list[list[int]]:
        """The new tokens of each row, filled up with padding behind its end."""
        import torch

        sampling: dict[str, Any] = {"do_sample": False}
        if self.config.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.config.temperature}
        with self._lock, torch.inference_mode():
            moved = {name: self._moved(value) for name, value in inputs.items()}
            if sampling["do_sample"]:
                torch.manual_seed(seed)
            output = self.model.generate(
                **moved,
                **sampling,
                num_beams=1,
                num_return_sequences=1,
                max_new_tokens=self.config.max_tokens,
                eos_token_id=self._ends or None,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    def _moved(self, value: "Tensor") -> "Tensor":
        return value.to(self._device, self.model.dtype if value.is_floating_point() else value.dtype)

    def _answer(self, tokens: Sequence[int], tokens_in: int) -> Answer:
        end = next((place + 1 for place, token in enumerate(tokens) if token in self._ends), None)
        own = tokens[:end]
        finish_reason = "length" if end is None and len(own) >= self.config.max_tokens else "stop"
        return Answer(self.tokenizer.decode(own, skip_special_tokens=True), finish_reason, tokens_in, len(own))


def _control_tokens(tokenizer: Any, image_token: str) -> list[str]:
    """The texts that the tokenizer reads as something else than text: ends, roles, places of images."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([image_token, *tokenizer.all_special_tokens, *added]))


def _begins_specially(text: str, tokenizer: Any) -> bool:
    """Whether a template has written the tokenizer's first token already."""
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
