"""The settings by which an encoder follows the recipe of a published model."""

import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config import Config
from stages.encoders.base import EncoderConfig
from stages.encoders.recipes.cleaning import CleaningName

_SLICE = re.compile(r"-?\d*:-?\d*(:\d+)?")
_PLACEHOLDER = re.compile(r"\{\w*\}")
_OUTPUT_OF_LAYERS = "last_hidden_state"


class Template(Config):
    """The text around a caption."""

    prefix: str = ""
    """Text before the caption; with `chat`, in the user's message."""
    suffix: str = ""
    """Text behind it; cut off first where a caption is too long."""
    system: str | None = None
    """With `chat`: the system message."""
    chat: dict[str, Any] | None = None
    """Puts the caption into the model's own chat template, with these options, such as `{enable_thinking: false}`.
    `add_generation_prompt` is true unless it is given; `system_as_parts` and `user_as_parts` write a message as a list
    of parts, as some vision-language models want. null: no chat template."""
    suffix_after_pads: str = ""
    """Text behind the padding, which truncation never removes; its tokens are made apart. Positions count the tokens
    that are not padding."""
    special_tokens: bool = True
    """Whether the tokenizer adds its start and end tokens to the text."""

    @field_validator("prefix", "suffix", "system", "suffix_after_pads")
    @classmethod
    def _check_placeholders(cls, text: str | None) -> str | None:
        found = _PLACEHOLDER.search(text or "")
        if found:
            raise ValueError(
                f"names the field {found[0]}, which there is none of; put the text before the caption into prefix and "
                "that behind it into suffix"
            )
        return text

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.system is not None and self.chat is None:
            raise ValueError("system needs the model's chat template; add chat: {}, or write it into prefix")
        return self


class Pads(Config):
    """Padding that the model is given and whose rows are stored, because the recipe's network reads them."""

    to: int | None = Field(default=None, ge=1)
    """Padded to this many rows."""
    multiple_of: int | None = Field(default=None, ge=2)
    """Padded to a multiple of this many rows."""
    add: int | None = Field(default=None, ge=1)
    """This many rows of padding, as far as max_tokens allows."""
    mode: Literal["masked", "encoded", "zeroed"] = "masked"
    """masked: no token attends to padding, and its own states are stored; encoded: padding is text like any other;
    zeroed: rows of zeros, which the model does not compute."""
    stored: bool = True
    """Whether the rows of padding are stored; false where they only change those of the text."""

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if [self.to, self.multiple_of, self.add].count(None) != 2:
            raise ValueError("give one of to, multiple_of and add")
        if not self.stored and self.mode != "encoded":
            raise ValueError(f"stored is false, and mode {self.mode} changes no row of the text; use pads: none")
        return self

    def number(self, rows: int, most: int) -> int:
        """Rows of padding for a caption of so many rows; `most` is the encoder's max_tokens."""
        if self.to is not None:
            return self.to - rows
        if self.multiple_of is not None:
            return -rows % self.multiple_of
        return max(0, min(self.add or 0, most - rows))


class EmptyCaption(Config):
    """What stands for the empty caption."""

    template: bool = True
    """Whether it has the template, as any caption."""
    text: str = ""
    """The text that is encoded in its place."""
    token: int | None = Field(default=None, ge=0)
    """The one token that is encoded in its place, by its number."""


class RecipeSettings(EncoderConfig):
    """Settings of a text encoder that follows a recipe; all of them are part of the fingerprint where they are set."""

    machine_fields = EncoderConfig.machine_fields | {"recipe"}

    recipe: str | None = None
    """Name of a shipped recipe (`pipeline config ls` lists them), whose settings are used where none are given."""
    template: Template | None = None
    """The text around each caption."""
    drop_prefix: int | Literal["auto", "prefix", "system"] = 0
    """Rows dropped from the beginning. auto: the tokens that end before the caption begins; prefix: as many as the
    text before the caption has by itself; system: as many as the templated system message has by itself."""
    keep_prefix: tuple[int, int] = (0, 0)
    """How many of the first and of the last dropped rows are kept all the same."""
    max_tokens_of: Literal["rows", "caption"] = "rows"
    """What max_tokens limits: the rows that are stored, or the caption before the template is put around it."""
    layers: tuple[int | str, ...] | None = None
    """Which states are kept: indices into transformers' hidden_states (0: embeddings, -1: the last layer), or slices
    of them, such as "1:" for all layers. null: as `output` says. Layers above the highest one are not run."""
    join: Literal["concat", "interleave", "stack"] = "concat"
    """How several layers share a row. concat and stack: layer after layer; a network that wants (tokens, layers,
    width) reshapes it. interleave: the layers of the first number of the width, then those of the second ..."""
    final_norm: bool | Literal["rms"] = True
    """Whether the last layer's states have the final norm. rms: each chosen state is divided by its root mean square
    instead, without weights."""
    pads: Pads | None = None
    """Padding whose rows are stored. none: no padding."""
    padding_side: Literal["right", "left"] = "right"
    """Where the padding stands."""
    cleaning: tuple[CleaningName, ...] = ()
    """What is done to a caption first, in this order: lower, strip, whitespace (its runs become one space), ftfy,
    html (entities are unescaped twice), deepfloyd, prx (those of these models). none: nothing."""
    empty: EmptyCaption = EmptyCaption()
    """The empty caption of classifier-free guidance. encode: like any caption; plain: without the template; or
    `{text: ...}` or `{token: ...}` in its place."""

    @field_validator("layers", mode="before")
    @classmethod
    def _read_layers(cls, value: Any) -> Any:
        items = value if isinstance(value, list | tuple) else None if value is None else [value]
        for item in items or ():
            is_index = isinstance(item, int) and not isinstance(item, bool)
            if not is_index and not (isinstance(item, str) and _SLICE.fullmatch(item)):
                raise ValueError('give indices, such as [9, 18, 27], or slices, such as "1:"')
        if items is not None and not items:
            raise ValueError("name at least one layer")
        return items

    @field_validator("final_norm", mode="before")
    @classmethod
    def _read_norm(cls, value: Any) -> Any:
        if value is not True and value is not False and value != "rms":
            raise ValueError("give true, false or rms")
        return value

    @field_validator("drop_prefix", mode="before")
    @classmethod
    def _read_drop(cls, value: Any) -> Any:
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not is_count and value not in ("auto", "prefix", "system"):
            raise ValueError("give a number of tokens, auto, prefix or system")
        return value

    @field_validator("pads", mode="before")
    @classmethod
    def _read_pads(cls, value: Any) -> Any:
        return None if value == "none" else value

    @field_validator("cleaning", mode="before")
    @classmethod
    def _read_cleaning(cls, value: Any) -> Any:
        items = [value] if isinstance(value, str) else value
        return [item for item in items if item != "none"] if isinstance(items, list | tuple) else items

    @field_validator("empty", mode="before")
    @classmethod
    def _read_empty(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in ("encode", "plain"):
                raise ValueError("give encode, plain, {text: ...} or {token: ...}")
            return {"template": value == "encode"}
        return value

    @model_validator(mode="after")
    def _check_recipe(self) -> Self:
        pads = self.pads
        if pads is not None and pads.to is not None and pads.to < self.max_tokens:
            raise ValueError(f"pads.to is {pads.to}, less than max_tokens ({self.max_tokens}); set max_tokens to it")
        if pads is not None and pads.mode == "masked" and self.padding_side == "left":
            raise ValueError(
                "padding_side is left, and masked padding on the left has no defined states (it attends to nothing); "
                "use pads: none, or mode: zeroed or encoded"
            )
        computed = pads is not None and pads.mode != "zeroed"
        if computed and self.padding_side == "left" and self.drop_prefix != 0:
            raise ValueError("drop_prefix needs padding on the right; leave padding_side out, or use pads: none")
        if pads is not None and not pads.stored and (self.padding_side == "left" or self._has_late_suffix):
            raise ValueError("pads.stored is false, which needs padding on the right and nothing behind it")
        if self.drop_prefix == "system" and (self.template is None or self.template.system is None):
            raise ValueError("drop_prefix is system, but template.system is not set; give a number of tokens")
        if self.drop_prefix in ("auto", "prefix") and self.template is None:
            raise ValueError(f"drop_prefix is {self.drop_prefix}, but there is no template; leave it out")
        if sum(self.keep_prefix) > 0 and self.drop_prefix == 0:
            raise ValueError("keep_prefix needs drop_prefix; leave it out")
        if self.layers is not None and self.output != _OUTPUT_OF_LAYERS:
            raise ValueError(f"layers and output: {self.output} exclude each other; leave output out")
        return self

    @property
    def _has_late_suffix(self) -> bool:
        return self.template is not None and self.template.suffix_after_pads != ""

    @property
    def needs_states(self) -> bool:
        """Whether more is wanted of the model than the last hidden states of text without padding."""
        computed = self.pads is not None and self.pads.mode != "zeroed"
        return computed or self.layers is not None or self.final_norm is not True

    @property
    def reads_lines(self) -> bool:
        """Whether captions are read with their tabs and line ends, as in the recipes' own code: where any setting of a
        recipe is set. Otherwise they are spaces, as they were to encoders before there were recipes."""
        return bool(self._recipe_fields(are_set=True))

    def _recipe_fields(self, *, are_set: bool) -> set[str]:
        fields = RecipeSettings.model_fields
        added = fields.keys() - EncoderConfig.model_fields.keys() - self.machine_fields
        return {name for name in added if (getattr(self, name) != fields[name].default) is are_set}

    def recorded_fields(self) -> Mapping[str, object]:
        """Settings of the recipe only where they are set: encoders that have none keep their fingerprint."""
        unset = self._recipe_fields(are_set=False)
        own = {name: value for name, value in super().recorded_fields().items() if name not in unset}
        parts = {name: part for name in own if isinstance(part := getattr(self, name), Config)}
        return own | {name: part.model_dump(mode="json", exclude_defaults=True) for name, part in parts.items()}
