"""The pages of a run: how far it is, live while it goes; its drops; the images of drops that are staged."""

import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pipeline.engine.run_view import RunView
from pipeline.engine.watch import RunWatch
from stages.browse.places import Place
from stages.browse.run.drops import PAGE_ROWS, Drops, DropsPage
from stages.browse.run.live import AfterRun, all_retry_command, failed_shards, retry_command, throughput_chart
from stages.browse.web import Part, part, render
from stages.precompute.fetch import SAMPLES

_VIEW_AGE_S = 1.0
"""Browsers that look at the same time share what was read."""
_IMAGE_S = 5.0


def routes(place: Place) -> list[Route]:
    """The pages below `/p/NUMBER`."""
    pages = RunPages(place)
    return [
        Route("/", pages.overview),
        Route("/live", pages.live),
        Route("/drops", pages.drops_page),
        Route("/drops/{shard:int}/{row:int}", pages.image),
    ]


class RunPages:
    """The pages of one run. Nothing is read before the first request."""

    def __init__(self, place: Place):
        self.place = place
        self._made: tuple[RunWatch, AfterRun, Drops] | None = None

    @property
    def _parts(self) -> tuple[RunWatch, AfterRun, Drops]:
        if self._made is None:
            watch = RunWatch(self.place.url)
            self._made = watch, AfterRun(watch), Drops(watch)
        return self._made

    def overview(self, request: Request) -> Response:
        """The page, with the live part as it is now."""
        return self._rendered(request, "run/page.html")

    def live(self, request: Request) -> Response:
        """The live part alone, which the page asks for every two seconds."""
        return self._rendered(request, "run/live.html")

    def _rendered(self, request: Request, template: str) -> Response:
        view = part(lambda: self._parts[0].look(_VIEW_AGE_S))
        details = self._details(view, request.app.state.places)
        return render(request, template, place=self.place, view=view, **details)

    def _details(self, view: Part[RunView], others: Sequence[Place]) -> dict[str, Any]:
        found = view.value
        if found is None:
            return {}
        watch, after, _ = self._parts
        return {
            "chart": part(lambda: throughput_chart(found)),
            "failed": part(lambda: failed_shards(watch.run)),
            "planned": part(lambda: after.planned(found)),
            "summary": part(lambda: after.summary(found)),
            "retry": all_retry_command(found),
            "store": next((other for other in others if other.run == self.place.number), None),
        }

    def drops_page(self, request: Request) -> Response:
        """Dropped rows, filtered and a page at a time."""
        query = request.query_params
        group, reason, text = query.get("group") or None, query.get("reason") or None, query.get("q", "").strip()
        first = _place(query.get("from"))
        shown = part(lambda: self._parts[2].page(group, reason, text, first))
        urls = part(lambda: self._with_urls(shown.value, wanted="urls" in query))
        chosen = {"group": group or "", "reason": reason or "", "q": text}
        return render(
            request,
            "run/drops.html",
            place=self.place,
            shown=shown,
            urls=urls,
            choices=part(lambda: self._parts[2].choices()),
            view=part(lambda: self._parts[0].look(_VIEW_AGE_S)),
            retry=part(lambda: self._retry(group, reason)),
            chosen=chosen,
            here=urlencode({name: value for name, value in {**chosen, "from": first}.items() if value}),
            links=_links(chosen, shown.value),
        )

    def _with_urls(self, shown: DropsPage | None, *, wanted: bool) -> str | None:
        return None if shown is None else self._parts[2].add_urls(shown, wanted=wanted)

    def _retry(self, group: str | None, reason: str | None) -> str:
        watch, _, drops = self._parts
        view = watch.look(_VIEW_AGE_S)
        if reason is None and group is None:
            return all_retry_command(view)
        chosen = [
            choice
            for choice in drops.choices()
            if choice.group == SAMPLES and group in (None, choice.group) and reason in (None, choice.reason)
        ]
        return retry_command(view, [choice.reason for choice in chosen])

    def image(self, request: Request) -> Response:
        """The bytes of a dropped image, as they were fetched."""
        shard, row = request.path_params["shard"], request.path_params["row"]
        found = part(lambda: self._parts[2].staged.image(shard, row, time.monotonic() + _IMAGE_S))
        if found.value is None:
            raise HTTPException(404, found.error or "not staged, or nothing that a browser shows")
        data, kind = found.value
        return Response(data, media_type=kind)


def _place(text: str | None) -> int:
    """A number from an address; 0 for anything else."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 16 else 0


def _links(chosen: dict[str, str], shown: DropsPage | None) -> dict[str, str]:
    """The addresses of the first, the previous and the next page, where there are any."""
    if shown is None:
        return {}
    places = {}
    if shown.first:
        places["first"] = 0
        if not chosen["q"]:
            places["prev"] = max(0, shown.first - PAGE_ROWS)
    if shown.next is not None:
        places["next"] = shown.next
    return {
        name: "drops?" + urlencode({key: value for key, value in {**chosen, "from": at}.items() if value})
        for name, at in places.items()
    }
