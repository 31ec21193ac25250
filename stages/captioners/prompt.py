"""Prompts with placeholders, which are filled with a sample's values as text and never evaluated."""

from collections.abc import Collection
from string import Formatter

from imagen_core.store import SampleRow

FIELDS = ("caption", "key", "url", "width", "height", "transcription", "label")
"""Placeholders that every source has; `caption` is the first caption of the sample."""


def parse_prompt(text: str) -> list[tuple[str, str | None]]:
    """The parts of a prompt: a text, and the placeholder behind it, or None.

    Raises:
        ValueError: a brace without its partner, or something else than a name in braces.
    """
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{error}; a brace that is text is written twice, {{{{ or }}}}") from None
    for _, name, format, conversion in parts:
        if name is not None and (not name or format or conversion):
            shown = name + (f"!{conversion}" if conversion else "") + (f":{format}" if format else "")
            raise ValueError(
                f"{{{shown}}} is no placeholder: only a name stands in braces; a brace that is text is written twice, "
                "{{ or }}"
            )
    return [(before, name) for before, name, _, _ in parts]


class Prompt:
    """A prompt, and the columns that its placeholders name."""

    def __init__(self, text: str, columns: Collection[str] = ()):
        """
        Args:
            columns: of the source that the store keeps.
        Raises:
            ValueError: like `parse_prompt`, or a placeholder is neither in FIELDS nor a column.
        """
        self._parts = parse_prompt(text)
        known = [*FIELDS, *sorted(columns)]
        for _, name in self._parts:
            if name is not None and name not in known:
                raise ValueError(
                    f"{{{name}}} is not known; use {', '.join(f'{{{each}}}' for each in known)}, or add the column to "
                    "source.keep_columns"
                )

    def fill(self, sample: SampleRow) -> str:
        """The prompt for a sample; what the sample lacks is empty."""
        return "".join(before + ("" if name is None else _text(sample, name)) for before, name in self._parts)


def _text(sample: SampleRow, name: str) -> str:
    if name in sample.columns:
        value = sample.columns[name]
    elif name == "caption":
        value = sample.captions[0] if sample.captions else ""
    else:
        value = getattr(sample, name, None)
    return "" if value is None else str(value)
