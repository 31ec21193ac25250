"""The pages of samplings and evaluations: images by prompt, results."""

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from pipeline.storage.open import open_storage
from stages.browse.places import Place
from stages.browse.training.images import ImageSets, by_prompt, columns_of
from stages.browse.training.png import png
from stages.browse.training.results import read_results
from stages.browse.web import error_line, part, render

_PROMPTS_PER_PAGE = 20
_IMAGES_PER_PROMPT = 16


def routes(place: Place) -> list[Route]:
    """The pages below `/p/NUMBER`."""
    storage = open_storage(place.url)
    sets = ImageSets(storage)

    def page(request: Request) -> Response:
        query = request.query_params
        found = part(sets.all)
        shown = found.value or []
        sizes = sorted({size for each in shown for size in each.sizes_px})
        size = next((each for each in sizes if str(each) == query.get("size")), None)
        search = query.get("q", "")[:1000]
        prompts = by_prompt(shown[0].images, search) if shown else []
        last = max(1, -(-len(prompts) // _PROMPTS_PER_PAGE))
        number = min(last, max(1, _number(query.get("page"), 1)))
        return render(
            request,
            "training/images.html",
            place=place,
            found=found,
            sets=shown,
            columns=columns_of(shown, size),
            sizes=sizes,
            size=size,
            search=search,
            prompts=prompts[(number - 1) * _PROMPTS_PER_PAGE : number * _PROMPTS_PER_PAGE],
            num_prompts=len(prompts),
            page=number,
            last_page=last,
            most_images=_IMAGES_PER_PROMPT,
            results=part(lambda: read_results(storage)) if place.kind == "evaluation" else None,
        )

    def image(request: Request) -> Response:
        wanted = request.path_params
        try:
            name = sets.file(wanted["set"], wanted["index"], wanted["size"])
        except Exception as error:  # noqa: BLE001 - shown in the place of the image
            return PlainTextResponse(error_line(error), 502)
        return PlainTextResponse("no such image", 404) if name is None else png(request, storage, name)

    return [Route("/", page), Route("/images/{set:int}/{size:int}/{index:int}.png", image)]


def _number(text: str | None, default: int) -> int:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 10 else default
