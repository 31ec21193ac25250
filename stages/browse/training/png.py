"""Images as they were written."""

import hashlib

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from pipeline.errors import PipelineError
from pipeline.storage import Storage
from stages.browse.web import error_line

_START, _END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def png(request: Request, storage: Storage, name: str) -> Response:
    """The PNG of a name that no request has chosen; a browser that has this version is told so.

    What cannot be shown (404: it is not there; 422: it is damaged; 502: it cannot be read) is a line of text.
    """
    try:
        version = storage.version(name)
        if version is None:
            return PlainTextResponse("not there, or not generated yet", 404)
        tag = f'"{hashlib.sha256(version.encode()).hexdigest()[:32]}"'
        headers = {"Cache-Control": "private, no-cache", "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        data = storage.read(name)
    except FileNotFoundError:
        return PlainTextResponse("not there any more", 404)
    except (PipelineError, OSError) as error:
        return PlainTextResponse(error_line(error), 502)
    if not (data.startswith(_START) and data.endswith(_END)):
        return PlainTextResponse(f"{name}: is no PNG, or was truncated ({len(data):,} bytes)", 422)
    return Response(data, media_type="image/png", headers=headers)
