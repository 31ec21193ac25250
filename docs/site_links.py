"""Hook of mkdocs: a link to a file of the repository that is no page becomes the file's path, as code.

The pages link to code, tests and measurements, for those who read them in the repository; the site has only the pages.
"""

import os
import re
from typing import Any

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """The page's text without links that lead out of the documents' folder."""
    folder = os.path.dirname(page.file.src_path)

    def replace(link: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(folder, link[1]))
        if not target.startswith("../"):
            return link[0]
        return f"`{target.removeprefix('../')}`"

    return _LINK.sub(replace, markdown)
