"""The application in this process, without a socket."""

import os
from collections.abc import Sequence

from starlette.testclient import TestClient

from stages.browse.app import make_app
from stages.browse.places import find_places
from stages.browse.security import Access

PORT = 8123


def client(*paths: str | os.PathLike[str], token: str | None = None, host: str = "127.0.0.1") -> TestClient:
    """A client of the application over some folders, as a browser of the same machine."""
    app = make_app(find_places([os.fspath(path) for path in paths]), Access(host, PORT, token))
    return TestClient(app, base_url=f"http://127.0.0.1:{PORT}", raise_server_exceptions=False)


def statuses(client: TestClient, addresses: Sequence[str]) -> list[int]:
    """The status of each page."""
    return [client.get(address).status_code for address in addresses]
