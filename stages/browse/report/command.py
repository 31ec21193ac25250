"""Collects the content of a report, renders the page and writes it."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from imagen_core.store import StoreError
from pipeline.commands import CommandResult
from pipeline.errors import ConfigError
from pipeline.storage import Storage
from pipeline.storage.open import open_storage
from pipeline.storage.run_folder import RunFolder
from stages.browse.places import kind_of
from stages.browse.report.store import plain_content, report_lines, store_content
from stages.browse.report.training import training_content
from stages.browse.web import templates
from stages.stores import open_store, store_folder

_FOLDER = "report"
_PAGE = f"{_FOLDER}/index.html"


def report_command(path: str) -> CommandResult:
    """Writes RUN/report/index.html (or `report/` beside a bare store) and says where it is.

    Args:
        path: a run folder, a store or a training; a local path or a URL.
    Raises:
        ConfigError: it is none of these, or a file of it cannot be read.
    """
    storage = open_storage(path)
    kind = kind_of(storage)
    if kind == "training":
        content = training_content(storage)
        page = _write(storage, "report/training.html", {"training": content})
        return {"report": page, "bytes": storage.size(_PAGE), **content.summary()}, [f"report  {page}"], 0
    if kind in ("sampling", "evaluation"):
        raise ConfigError(
            f"PATH {path}: is the folder of a {kind}, and reports are about runs, stores and trainings; "
            f"`pipeline browse {path}` shows it"
        )
    return _store_report(path)


def _store_report(path: str) -> CommandResult:
    store = open_store(path)
    run = RunFolder(store_folder(path).rpartition("/")[0])
    try:
        content = store_content(store, run)
    except StoreError as error:
        raise ConfigError(str(error)) from error
    page = _write(run.storage, "report/store.html", content)
    result: dict[str, object] = {"report": page, "bytes": run.storage.size(_PAGE), **plain_content(content)}
    return result, [f"report  {page}", *report_lines(content)], 0


def _write(storage: Storage, template: str, content: Mapping[str, Any]) -> str:
    text = templates().get_template(template).render(**content, style=_style())
    storage.clean(_FOLDER)
    storage.write_text(_PAGE, text)
    return f"{storage.url}/{_PAGE}"


def _style() -> Markup:
    """The style of `pipeline browse`, to be written into the page."""
    found = files("stages.browse").joinpath("static").iterdir()
    return Markup("\n".join(file.read_text("utf-8") for file in sorted(found, key=str) if file.name.endswith(".css")))
