"""Captions by an image-text model of transformers, in workers of our own: a caption depends on its own image, prompt
and seed alone."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from pipeline.errors import ConfigError, MachineError, first_line
from pipeline.executors.base import usable_cpus
from pipeline.fingerprint import digest
from pipeline.resources import Resources
from pipeline.storage.files import file_digest
from stages.captioners.base import Answer, Captioner, ModelCaptionerConfig, NextQuestion, Question
from stages.captioners.budget import Used
from stages.captioners.prompt import parse_prompt
from stages.encoders.batches.memory import run_batches
from stages.encoders.identity import acting_settings
from stages.encoders.loading import load_weights, place
from stages.encoders.model_files import ModelFiles, check_headers, find_model

if TYPE_CHECKING:
    from torch import Tensor

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja", "chat_template.json")
_GENERATION = "generation_config.json"
_REFUSED = "request_refused"


class TransformersCaptionerConfig(ModelCaptionerConfig):
    """An `AutoModelForImageTextToText` with a chat template."""

    machine_fields = ModelCaptionerConfig.machine_fields | {
        "model",
        "revision",
        "batch_size",
        "num_gpus",
        "num_cpus",
        "workers",
        "resources",
        "cpu_threads",
    }

    kind: Literal["transformers"] = "transformers"
    model: str = Field(min_length=1)
    """Hub id, or local folder."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of weights and activations."""
    batch_size: int = Field(default=8, ge=1)
    """Images in one batch of the model; halved where they do not fit into memory. With a temperature above 0 each
    image is a batch of its own."""
    num_gpus: float | None = Field(default=None, ge=0)
    """GPUs of one worker, also a fraction. null: one if there are any; 0: run on the CPU."""
    num_cpus: float = Field(default=1.0, gt=0)
    """CPUs reserved for a GPU worker."""
    workers: int | None = Field(default=None, ge=1)
    """Workers that hold the model; null: one for each GPU, or one."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Ray resources of the cluster that a worker requests in addition to CPU and GPU, as
    `{"accelerator_type:H100": 0.001}`. Ignored without --address."""
    cpu_threads: int | None = Field(default=None, ge=1)
    """Threads of a worker that runs on the CPU; null: the number of CPUs divided by the number of workers."""

    def files(self) -> ModelFiles:
        """The model's files.

        Raises:
            ConfigError: it is no single model.
            MachineError: it cannot be found, or is damaged.
        """
        try:
            files = find_model(self.model, self.revision)
            check_headers(files)
        except (ConfigError, MachineError) as error:
            raise self.named(error) from error
        return files

    def named(self, error: ConfigError | MachineError) -> ConfigError | MachineError:
        """An error about the model of an encoder, as one about this model."""
        return type(error)(str(error).replace("encoders.model", f"captioners.{self.name}.model"))

    def made_by(self) -> dict[str, Any]:
        files = self.files()
        processor = [name for name in _PROCESSOR_FILES if (files.folder / name).is_file()]
        generation = files.folder / _GENERATION
        return {
            **super().made_by(),
            **files.identity,
            "tokenizer_sha256": files.tokenizer_sha256,
            "processor_sha256": digest({name: file_digest(files.folder / name) for name in processor}),
            "generation_sha256": file_digest(generation) if generation.is_file() else None,
            "model_config": acting_settings(files.config),
        }

    def pinned(self) -> Self:
        if Path(self.model).is_dir():
            return self.model_copy(update={"model": str(Path(self.model).absolute())})
        return self.model_copy(update={"revision": self.files().revision})

    def start(self, usage: Callable[[], Used]) -> Captioner:
        return GeneratingCaptioner(self)

    @property
    def is_repeatable(self) -> bool:
        return self.temperature == 0

    def worker_count(self) -> int:
        return self.workers or 0

    def threads(self) -> int:
        """CPU threads of one worker."""
        return self.cpu_threads or max(1, usable_cpus() // (self.workers or 1))

    def occupies(self) -> Resources:
        return Resources(self.num_cpus, self.num_gpus, self.resources)

    def modules(self) -> tuple[str, ...]:
        return ("torch", "transformers.models.auto.modeling_auto", "transformers.models.auto.processing_auto")


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
