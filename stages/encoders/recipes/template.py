"""Captions as the input of a model: cleaned, put into a template, truncated, padded; and which rows are dropped."""

from collections.abc import Sequence
from typing import Any

from pipeline.errors import ConfigError
from stages.captions import on_one_line
from stages.encoders.batches.model_input import DIFFERENT_CAPTIONS, ModelInput
from stages.encoders.batches.tokens import tokenize
from stages.encoders.recipes.cleaning import check_cleaning, clean
from stages.encoders.recipes.settings import RecipeSettings, Template

_CAPTION = "\ue000"
"""Stands for the caption while a chat template is read: a character of private use."""
_PART_OPTIONS = ("system_as_parts", "user_as_parts")


class RecipeReader:
    """Turns captions into inputs of a model, as a recipe says.

    Attributes:
        before, after: the text around each caption.
    Raises:
        ConfigError: the tokenizer lacks what the recipe needs, more is dropped than the template has, or the template
            leaves a caption no room.
    """

    def __init__(self, config: RecipeSettings, tokenizer: Any, around: tuple[str, str] | None = None):
        """
        Args:
            tokenizer: of transformers.
            around: the text before and after each caption; None: as the template says.
        """
        self._config, self._tokenizer = config, tokenizer
        self._where = f"encoders.{config.name}"
        check_cleaning(config.cleaning, f"{self._where}.cleaning")
        template = config.template or Template()
        self._special = template.special_tokens
        self.before, self.after = self._around(template) if around is None else around
        self._suffix = self._tokens(template.suffix_after_pads, special=False) if template.suffix_after_pads else []
        self._dropped = self._count_dropped(template)
        self._check_dropped()
        self._check_room()
        pads = config.pads
        if pads is not None and pads.mode != "zeroed" and tokenizer.pad_token_id is None:
            raise ConfigError(
                f"{self._where}.pads: {config.model}'s tokenizer has no pad_token; use mode: zeroed, or name one in "
                "its tokenizer_config.json"
            )
        if not self._empty().ids:
            raise ConfigError(
                f"{self._where}.empty: nothing is left of the empty caption once {self._config.drop_prefix} rows are "
                "dropped; use empty: plain, {text: ...} or {token: ...}"
            )

    def __call__(self, captions: Sequence[str]) -> tuple[list[ModelInput], int]:
        """An input for each caption, and how many captions were truncated; a caption of which nothing is left has no
        ids."""
        read = captions if self._config.reads_lines else [on_one_line(caption) for caption in captions]
        cleaned = [clean(caption, self._config.cleaning) for caption in read]
        places = [i for i, caption in enumerate(cleaned) if caption]
        inputs = [self._empty() if not caption else ModelInput([]) for caption in captions]
        found, num_truncated = self._read([cleaned[i] for i in places])
        for i, each in zip(places, found, strict=True):
            inputs[i] = each
        return inputs, num_truncated

    def _read(self, texts: Sequence[str]) -> tuple[list[ModelInput], int]:
        """The inputs of texts that go into the template."""
        if not texts:
            return [], 0
        num_truncated = 0
        if self._config.max_tokens_of == "caption":
            texts, num_truncated = self._cut_captions(texts)
        whole = [f"{self.before}{text}{self.after}" for text in texts]
        dropped = self._dropped
        if dropped is None:
            return self._read_by_offsets(whole, num_truncated)
        ids, cut = tokenize(self._tokenizer, whole, self._limit(dropped), special_tokens=self._special)
        return [self._input(each, dropped) for each in ids], num_truncated + cut

    def _read_by_offsets(self, whole: Sequence[str], num_truncated: int) -> tuple[list[ModelInput], int]:
        """The same where each text has its own number of dropped tokens: those that end before the caption begins."""
        found = self._tokenizer(
            list(whole), return_offsets_mapping=True, verbose=False, add_special_tokens=self._special
        )
        inputs: list[ModelInput] = []
        for text, ids, offsets in zip(whole, found["input_ids"], found["offset_mapping"], strict=True):
            dropped = next((i for i, (_, end) in enumerate(offsets) if end > len(self.before)), len(ids))
            limit = self._limit(dropped)
            if len(ids) > limit:
                (ids,), _ = tokenize(self._tokenizer, [text], limit, special_tokens=self._special)
                num_truncated += 1
            inputs.append(self._input(ids, dropped))
        return inputs, num_truncated

    def _cut_captions(self, texts: Sequence[str]) -> tuple[list[str], int]:
        """The texts with at most max_tokens tokens each, and how many were cut."""
        found = self._tokenizer(list(texts), return_offsets_mapping=True, verbose=False, add_special_tokens=False)
        most = self._config.max_tokens
        ends = [offsets[most - 1][1] if len(offsets) > most else None for offsets in found["offset_mapping"]]
        return [text[:end] for text, end in zip(texts, ends, strict=True)], len(ends) - ends.count(None)

    def _empty(self) -> ModelInput:
        """The input for the empty caption."""
        rule = self._config.empty
        if rule.token is not None:
            return self._input([rule.token], 0, suffix=[])
        if rule.template:
            return self._read([rule.text])[0][0]
        ids, _ = tokenize(self._tokenizer, [rule.text], self._config.max_tokens, special_tokens=True)
        return self._input(ids[0], 0, suffix=[])

    def _limit(self, dropped: int) -> int:
        """Most tokens of a text with its template."""
        if self._config.max_tokens_of == "caption":
            return 2**30
        head, start = self._kept_from(dropped)
        return max(1, self._config.max_tokens - head + start - len(self._suffix))

    def _kept_from(self, dropped: int) -> tuple[int, int]:
        """How many first rows are kept, and from which row on all others are."""
        first, last = self._config.keep_prefix
        head = min(first, dropped)
        return (head, max(head, dropped - last)) if dropped else (0, 0)

    def _input(self, ids: list[int], dropped: int, suffix: list[int] | None = None) -> ModelInput:
        suffix = self._suffix if suffix is None else suffix
        head, start = self._kept_from(dropped)
        rows = len(ids) + len(suffix) - start
        if rows <= 0 or not ids:
            return ModelInput([])
        pads = self._config.pads
        number = 0 if pads is None else pads.number(head + rows, self._config.max_tokens)
        if pads is None or number <= 0:
            return ModelInput([*ids, *suffix], head=head, start=start)
        left = self._config.padding_side == "left"
        if pads.mode == "zeroed":
            before, after = (number, 0) if left else (0, number)
            return ModelInput([*ids, *suffix], (0, 0), head, start, 0, before, after)
        padding = [self._tokenizer.pad_token_id] * number
        masked = (len(ids), len(ids) + number) if pads.mode == "masked" else (0, 0)
        padded = [*padding, *ids] if left else [*ids, *padding]
        return ModelInput([*padded, *suffix], masked, head, start, 0 if pads.stored else number)

    # ---- what is the same for all captions ----

    def _tokens(self, text: str, *, special: bool | None = None) -> list[int]:
        special = self._special if special is None else special
        return self._tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"]

    def _around(self, template: Template) -> tuple[str, str]:
        if template.chat is None:
            return template.prefix, template.suffix
        text = self._chat(template, f"{template.prefix}{_CAPTION}{template.suffix}")
        before, found, after = text.partition(_CAPTION)
        if not found or _CAPTION in after:
            raise ConfigError(
                f"{self._where}.template.chat: {self._config.model}'s chat template does not show the user's message "
                "once; write the text out in prefix and suffix"
            )
        return before, after

    def _chat(self, template: Template, message: str | None) -> str:
        """The chat template with this message of the user; None: with the system message alone."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise ConfigError(
                f"{self._where}.template.chat: {self._config.model}'s tokenizer has no chat template; write the text "
                "out in prefix and suffix, or give a model that has one"
            )
        options = {"add_generation_prompt": message is not None, **(template.chat or {})}
        parts = {option.split("_")[0]: options.pop(option, False) for option in _PART_OPTIONS}
        contents = {"system": template.system, "user": message}
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if parts[role] else text}
            for role, text in contents.items()
            if text is not None
        ]
        if message is None:
            options["add_generation_prompt"] = False
        return self._tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def _count_dropped(self, template: Template) -> int | None:
        """Rows dropped of each caption; None if their number differs by caption."""
        rule = self._config.drop_prefix
        if rule == "auto" and not getattr(self._tokenizer, "is_fast", False):
            raise ConfigError(
                f"{self._where}.drop_prefix: auto needs a fast tokenizer, which {self._config.model} has not; give a "
                "number of tokens"
            )
        if rule == "auto":
            return None
        if rule == "prefix":
            return len(self._tokens(self.before))
        return len(self._tokens(self._chat(template, None))) if rule == "system" else rule

    def _check_dropped(self) -> None:
        """Refuses a number of dropped rows that leaves nothing of a short caption."""
        least = len(self._tokens(f"{self.before}a{self.after}")) + len(self._suffix)
        if self._dropped is not None and self._kept_from(self._dropped)[1] >= least:
            raise ConfigError(
                f"{self._where}.drop_prefix: {self._dropped} rows are dropped ({self._config.drop_prefix}), but the "
                f'template has only {least} tokens with the caption "a"; drop fewer'
            )

    def _check_room(self) -> None:
        """Refuses a template that is cut off before the caption begins: all captions would be the same."""
        inputs, num_truncated = self._read(DIFFERENT_CAPTIONS)
        if num_truncated == len(inputs) and all(each == inputs[0] for each in inputs):
            raise ConfigError(
                f"{self._where}.max_tokens is {self._config.max_tokens}, which the template before the caption fills, "
                "so nothing of a caption would be read; raise it, or drop the template's rows with drop_prefix"
            )
