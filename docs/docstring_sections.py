"""Extension of griffe: sections of a docstring that follow each other without an empty line are sections too."""

import re
from typing import Any

import griffe

_SECTION = re.compile(r"(?m)(?<!\n)\n(?=(?:Args|Attributes|Returns|Yields|Raises):$)")


class SeparateSections(griffe.Extension):
    """Puts an empty line before each section, as griffe's parser expects it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _SECTION.sub("\n\n", obj.docstring.value)
