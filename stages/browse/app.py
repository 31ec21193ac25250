"""The web application: index, the pages of each place, static files, errors."""

import logging
from collections.abc import Callable, Sequence
from importlib.resources import files

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from imagen_core.far import StorageError
from imagen_core.store import StoreError
from pipeline.errors import PipelineError
from stages.browse.places import Kind, Place
from stages.browse.run.pages import routes as run_routes
from stages.browse.security import Access, OnlyThisUser
from stages.browse.store.pages import routes as store_routes
from stages.browse.summary import summary_of
from stages.browse.training.image_pages import routes as image_routes
from stages.browse.training.pages import compare, compared_curves
from stages.browse.training.pages import routes as training_routes
from stages.browse.web import error_line, part, render

PARTS: dict[Kind, Callable[[Place], list[Route]]] = {
    "run": run_routes,
    "store": store_routes,
    "training": training_routes,
    "sampling": image_routes,
    "evaluation": image_routes,
}
"""The pages of a place, by its kind: routes below `/p/NUMBER`, one of them `/`."""
_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_FAILURES = (StoreError, PipelineError, StorageError, OSError, Exception)
"""What a page may raise; only of the last, a fault of ours, the server learns too."""
_log = logging.getLogger(__name__)


def make_app(places: Sequence[Place], access: Access) -> ASGIApp:
    """The application over some places; it answers only whom `access` lets in."""
    mounts = [Mount(f"/p/{place.number}", routes=_routes(place)) for place in places]
    app = Starlette(
        routes=[
            Route("/", _index),
            Route("/static/{name}", _static),
            Route("/compare", compare),
            Route("/compare/curves", compared_curves),
            *mounts,
        ],
        exception_handlers={HTTPException: _refused, **dict.fromkeys(_FAILURES, _failed)},
    )
    app.state.places = list(places)
    app.state.static = _static_files()
    return OnlyThisUser(app, access)


def _routes(place: Place) -> list[Route]:
    pages = PARTS.get(place.kind)
    return pages(place) if pages else [Route("/", lambda request: render(request, "nothing.html", place=place))]


def _index(request: Request) -> Response:
    summaries = [(place, part(lambda place=place: summary_of(place))) for place in request.app.state.places]
    return render(request, "index.html", place=None, summaries=summaries)


def _static_files() -> dict[str, tuple[bytes, str]]:
    """Content and type of each file of `static/`, read once: no name of a request reaches the disk."""
    found = ((file.name, file) for file in files("stages.browse").joinpath("static").iterdir() if file.is_file())
    return {name: (file.read_bytes(), _TYPES[name.rpartition(".")[2]]) for name, file in found}


def _static(request: Request) -> Response:
    found = request.app.state.static.get(request.path_params["name"])
    if found is None:
        raise HTTPException(404)
    return Response(found[0], media_type=found[1], headers={"Cache-Control": "no-cache"})


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return render(
        request, "error.html", status=error.status_code, place=None, code=error.status_code, line=error.detail
    )


def _failed(request: Request, error: Exception) -> Response:
    _log.debug("page %s", request.url.path, exc_info=error)
    return render(request, "error.html", status=500, place=None, code=500, line=error_line(error))
