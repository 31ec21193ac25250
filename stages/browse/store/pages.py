"""The pages of a store: the grid, a sample."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stages.browse.places import Place
from stages.browse.web import render


def routes(place: Place) -> list[Route]:
    """The pages below `/p/NUMBER`."""

    def grid(request: Request) -> Response:
        return render(request, "nothing.html", place=place)

    return [Route("/", grid)]
