"""The pages of a training: curves, grids, configuration; several trainings laid over each other."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pipeline.storage import Storage
from pipeline.storage.open import open_storage
from stages.browse.places import Place
from stages.browse.training.curves import SMOOTHINGS, Curves, View, curves_of
from stages.browse.training.folder import (
    config_differences,
    config_text,
    grid_name,
    grid_steps,
    starts_of,
    state_of,
)
from stages.browse.training.metrics import Metrics, MetricsFile
from stages.browse.training.png import png
from stages.browse.web import Part, part, render

_MOST_COMPARED = 8
_SHOWN_LAST = ("loss", "validation_loss", "alignment", "lr", "grad_norm", "images_per_s", "loader_wait")


def routes(place: Place) -> list[Route]:
    """The pages below `/p/NUMBER`."""
    return [
        Route("/", _page(place, _training)),
        Route("/curves", _page(place, _curves)),
        Route("/settings", _page(place, _settings)),
        Route("/grids/{step:int}.png", _page(place, _grid)),
    ]


def compare(request: Request) -> Response:
    """`/compare?place=1&place=2`: the curves of several trainings, and how their configurations differ."""
    places = _chosen(request)
    view = View.of(request.query_params)
    curves = _curves_of(places, view)
    differences = part(lambda: config_differences([_storage(each) for each in places])) if len(places) > 1 else None
    return render(
        request,
        "training/compare.html",
        place=None,
        chosen=places,
        trainings=_trainings(request),
        view=view,
        smoothings=SMOOTHINGS,
        curves=curves,
        differences=differences,
        live=f"/compare/curves?{_query(view, places)}",
    )


def compared_curves(request: Request) -> Response:
    """The curves of `compare` alone, to be shown in their place."""
    curves = _curves_of(_chosen(request), View.of(request.query_params))
    return render(request, "training/curves.html", curves=curves, last={}, steps=[], state=None)


def _training(request: Request, place: Place) -> Response:
    storage, view = _storage(place), View.of(request.query_params)
    steps = part(lambda: grid_steps(storage))
    asked = request.query_params.get("grid", "")
    shown = int(asked) if asked.isascii() and asked.isdigit() and int(asked) in (steps.value or ()) else None
    return render(
        request,
        "training/training.html",
        place=place,
        view=view,
        smoothings=SMOOTHINGS,
        others=[each for each in _trainings(request) if each != place],
        starts=part(lambda: starts_of(storage)),
        grids=steps,
        shown=shown if shown is not None or not steps.value else steps.value[-1],
        live=f"{place.href}curves?{_query(view)}",
        **_fragment(place, view, steps.value or []),
    )


def _curves(request: Request, place: Place) -> Response:
    steps = part(lambda: grid_steps(_storage(place)))
    return render(
        request, "training/curves.html", **_fragment(place, View.of(request.query_params), steps.value or [])
    )


def _fragment(place: Place, view: View, steps: Sequence[int]) -> dict[str, Any]:
    """What `curves.html` shows."""
    curves = _curves_of([place], view)
    metrics = curves.value[1][0] if curves.value else None
    last = metrics.last() if metrics else {}
    state = part(lambda: state_of(_storage(place)))
    return {
        "curves": curves,
        "steps": steps,
        "last": {name: last[name] for name in _SHOWN_LAST if name in last},
        "state": state.value or state.error,
    }


def _settings(request: Request, place: Place) -> Response:
    storage, asked = _storage(place), request.query_params.get("other")
    others = [each for each in _trainings(request) if each != place]
    other = next((each for each in others if str(each.number) == asked), None)
    return render(
        request,
        "training/settings.html",
        place=place,
        others=others,
        other=other,
        text=part(lambda: config_text(storage)),
        differences=None if other is None else part(lambda: config_differences([storage, _storage(other)])),
    )


def _grid(request: Request, place: Place) -> Response:
    return png(request, _storage(place), grid_name(request.path_params["step"]))


def _curves_of(places: Sequence[Place], view: View) -> Part[tuple[Curves, list[Metrics]]]:
    def make() -> tuple[Curves, list[Metrics]]:
        metrics = [_metrics(place).read(1.0 / len(places)) for place in places]
        names = [place.name for place in places]
        return curves_of(tuple(zip(names, metrics, strict=True)), view), metrics

    return part(make) if places else Part((Curves((), ()), []))


def _chosen(request: Request) -> list[Place]:
    """The trainings that an address names, in its order, each once.

    Raises:
        HTTPException: one is no training, or there are too many.
    """
    trainings = {str(each.number): each for each in _trainings(request)}
    asked = list(dict.fromkeys(request.query_params.getlist("place")))
    if unknown := [number for number in asked if number not in trainings]:
        raise HTTPException(404, f"place {unknown[0][:20]} is no training; choose from the list of /compare")
    if len(asked) > _MOST_COMPARED:
        raise HTTPException(400, f"{len(asked)} trainings are too many for one chart; choose at most {_MOST_COMPARED}")
    return [trainings[number] for number in asked]


def _trainings(request: Request) -> list[Place]:
    return [place for place in request.app.state.places if place.kind == "training"]


def _query(view: View, places: Sequence[Place] = ()) -> str:
    return urlencode([*view.query().items(), *(("place", str(each.number)) for each in places)])


@lru_cache(maxsize=32)
def _storage(place: Place) -> Storage:
    return open_storage(place.url)


@lru_cache(maxsize=32)
def _metrics(place: Place) -> MetricsFile:
    return MetricsFile(_storage(place))


def _page(place: Place, function: Callable[[Request, Place], Response]) -> Callable[[Request], Response]:
    return lambda request: function(request, place)
