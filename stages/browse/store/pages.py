"""The pages of a store: the grid, a sample, its images, heat maps and nearest samples."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from imagen_core.store import Store
from stages.browse.places import Place
from stages.browse.store.grid import histogram_of, page_of
from stages.browse.store.images import error_image, heat_map, png, stored_image
from stages.browse.store.nearest import nearest
from stages.browse.store.query import Query, QueryError
from stages.browse.store.sample import (
    captions_of,
    embedding_groups,
    embedding_row,
    embedding_values,
    file_digest_of,
    image_embeddings_of,
    images_of,
)
from stages.browse.store.table import SamplesTable
from stages.browse.store.view import StoreView, position_of
from stages.browse.web import error_line, part, render
from stages.store_tools.lineage import stored_row

_WAIT_S = 0.5
"""So long a first page waits for all shards to be read, before it shows the samples that are."""
_MOST_OPTIONS = 100
_FOR_EVER = "private, max-age=31536000, immutable"
_SVG = "image/svg+xml"


def routes(place: Place) -> list[Route]:
    """The pages below `/p/NUMBER`."""
    pages = _Pages(place)
    sample = "{shard:int}/{row:int}"
    return [
        Route("/", pages.grid),
        Route(f"/sample/{sample}", pages.sample),
        Route(f"/image/{sample}/{{size:int}}", pages.image),
        Route(f"/heat/{sample}/{{group:int}}/{{number:int}}", pages.heat),
        Route(f"/nearest/{sample}/{{group:int}}/{{number:int}}", pages.nearest),
    ]


class _Pages:
    def __init__(self, place: Place):
        self.place = place
        self.view = StoreView(place)

    def grid(self, request: Request) -> Response:
        with ExitStack() as stack:
            opened = part(lambda: stack.enter_context(self.view.table()))
            if opened.value is None:
                return render(request, "store/missing.html", status=503, place=self.place, line=opened.error)
            return self._grid(request, opened.value)

    def _grid(self, request: Request, table: SamplesTable) -> Response:
        table.wait(_WAIT_S)
        query = _query(request, table)
        with table.asking(query) as answers:
            found = part(lambda: page_of(answers, _page_number(request.query_params)))
            charts = [part(lambda field=field: histogram_of(answers, table, field, query)) for field in table.fields]
        return render(
            request,
            "store/grid.html",
            place=self.place,
            table=table,
            query=query,
            page=found,
            charts=[chart for chart in charts if chart.error or chart.value],
            options=part(lambda: _options(table)).value or {},
            thumbnails=part(lambda: self._thumbnails((r.shard, r.row) for r in found.get().rows)).value or {},
        )

    def _thumbnails(self, places: Iterable[tuple[int, int]]) -> dict[tuple[int, int], str]:
        """The address of the image that a grid shows, by shard and row: of the smallest size of 100 px or more, else
        of the largest."""
        with self.view.reading() as store:
            sizes = store.image_sizes
            if not sizes:
                return {}
            size = next((size for size in sizes if size >= 100), sizes[-1])
            group, found = store.image_group(size).name, {}
            for shard, row in places:
                digest = file_digest_of(store, group, position_of(store, shard, row))
                found[shard, row] = f"{self.place.href}image/{shard}/{row}/{size}?digest={digest}"
            return found

    def sample(self, request: Request) -> Response:
        with self.view.table() as table:
            return self._sample(request, table)

    def _sample(self, request: Request, table: SamplesTable) -> Response:
        shard, row = _place_of(request)
        query = _query(request, table)
        with self.view.reading() as store:
            position = _position(store, shard, row)
            content = {
                "lineage": part(lambda: stored_row(store, position, row, self.view.run)),
                "images": images_of(store, position, row),
                "captions": part(lambda: captions_of(store, position, row, self.view.run)),
                "embeddings": image_embeddings_of(store, position, row),
                "key": part(lambda: store.shard(position).samples.key(row)),
            }
        table.wait(_WAIT_S)
        at = request.query_params.get("at", "")
        around = (
            part(lambda: _around(table, query, int(at))).value
            if at.isascii() and at.isdigit() and len(at) < 10
            else None
        )
        here = {"place": self.place, "shard": shard, "row": row, "query": query, "around": around}
        return render(request, "store/sample.html", **here, **content)

    def image(self, request: Request) -> Response:
        shard, row = _place_of(request)
        size = request.path_params["size"]
        try:
            with self.view.reading() as store:
                position = _position(store, shard, row)
                if size not in store.image_sizes:
                    raise HTTPException(404, f"the store has no images of {size} px")
                digest = file_digest_of(store, store.image_group(size).name, position)
                data, kind = stored_image(store, position, row, size)
        except HTTPException:
            raise
        except Exception as error:  # noqa: BLE001 - shown in the place of the image
            return Response(error_image(error_line(error)), media_type=_SVG)
        is_named = request.query_params.get("digest") == digest
        headers = {"Cache-Control": _FOR_EVER} if is_named else {}
        return Response(data, media_type=kind, headers=headers)

    def heat(self, request: Request) -> Response:
        shard, row = _place_of(request)
        try:
            with self.view.reading() as store:
                position, group = _position(store, shard, row), _group(store, request)
                number = _caption_row(store, group, position, row, request)
                values = embedding_values(store, group, position, number)
            return Response(png(heat_map(values)), media_type="image/png")
        except HTTPException:
            raise
        except Exception as error:  # noqa: BLE001 - shown in the place of the image
            return Response(error_image(error_line(error)), media_type=_SVG)

    def nearest(self, request: Request) -> Response:
        shard, row = _place_of(request)
        with self.view.reading() as store:
            position, group = _position(store, shard, row), _group(store, request)
            _caption_row(store, group, position, row, request)
        number = request.path_params["number"]
        own = part(lambda: Store.open(self.place.url, max_open_shards=2))
        found = part(lambda: nearest(own.get(), group, _position(own.get(), shard, row), row, number))
        here = {"place": self.place, "shard": shard, "row": row, "group": group.name}
        thumbnails = part(lambda: self._thumbnails((n.shard, n.row) for n in found.get().found)).value or {}
        return render(request, "store/nearest.html", **here, nearest=found, thumbnails=thumbnails)


def _query(request: Request, table: SamplesTable) -> Query:
    try:
        return Query.parse(request.query_params, table.fields, table.caption_sets)
    except QueryError as error:
        raise HTTPException(400, str(error)) from error


def _page_number(given: Mapping[str, str]) -> int:
    text = given.get("page", "1")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 1


def _options(table: SamplesTable) -> dict[str, list[str]]:
    """The values that the form offers of each field with choices."""
    choices = [field for field in table.fields if field.kind == "choice"]
    with table.asking(Query.parse({}, table.fields)) as answers:
        return {field.key: [value for value, _ in answers.choices(field, _MOST_OPTIONS)] for field in choices}


def _around(table: SamplesTable, query: Query, at: int) -> dict[str, Any]:
    """The samples before and after number `at` of those that fit."""
    first = max(0, at - 1)
    with table.asking(query) as answers:
        rows = answers.rows(first, at - first + 2)
    before, after = rows[: at - first], rows[at - first + 1 :]
    return {"at": at, "before": before[0] if before else None, "after": after[0] if after else None}


def _place_of(request: Request) -> tuple[int, int]:
    return request.path_params["shard"], request.path_params["row"]


def _position(store: Store, shard: int, row: int) -> int:
    try:
        return position_of(store, shard, row)
    except LookupError as error:
        raise HTTPException(404, str(error)) from error


def _group(store: Store, request: Request) -> Any:
    groups, index = embedding_groups(store), request.path_params["group"]
    if index >= len(groups):
        raise HTTPException(404, "the store has no such group of embeddings")
    return groups[index]


def _caption_row(store: Store, group: Any, position: int, row: int, request: Request) -> int:
    try:
        return embedding_row(store, group, position, row, request.path_params["number"])
    except LookupError as error:
        raise HTTPException(404, str(error)) from error
