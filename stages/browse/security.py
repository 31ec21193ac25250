"""Who may read the pages: the browser of this machine's user, asked for by no other site."""

import hmac
import ipaddress
import secrets
import socket
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_WILDCARDS = ("0.0.0.0", "::", "")
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; style-src 'self'; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True, slots=True)
class Access:
    """Which requests are answered.

    Attributes:
        host: the address that the server listens on, as it was given.
        token: what a request must have had once; None on a loopback address.
    """

    host: str
    port: int
    token: str | None

    @classmethod
    def to(cls, host: str, port: int) -> "Access":
        """With a new random token unless only this machine can connect."""
        return cls(host, port, None if is_loopback(host) else secrets.token_urlsafe(24))

    @property
    def url(self) -> str:
        """What to open in a browser."""
        host = socket.gethostname() if self.host in _WILDCARDS else self.host
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.port}/" + (f"?token={self.token}" if self.token else "")

    @property
    def cookie(self) -> str:
        """Its name; a browser keeps cookies by host, whatever the port."""
        return f"pipeline-browse-{self.port}"

    def is_ours(self, host_header: str) -> bool:
        """Whether a `Host` header names this server. Another name means that somebody's DNS points here.

        A server on all addresses is named by any of them, or by this machine's name.
        """
        name, port = _split_host(host_header)
        if port != self.port and not (port is None and self.port == 80):
            return False
        if self.host in _WILDCARDS:
            return name in {*LOOPBACK, socket.gethostname().lower(), socket.getfqdn().lower()} or _is_address(name)
        return name == self.host.lower() or (is_loopback(self.host) and name in LOOPBACK)

    def has_token(self, given: str) -> bool:
        return self.token is None or hmac.compare_digest(given.encode(), self.token.encode())


class OnlyThisUser:
    """Middleware: refuses what is not a read by the user's own browser, and adds the headers that bind the browser."""

    def __init__(self, app: ASGIApp, access: Access):
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self.app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        """What is answered instead of the page; None if it may be read."""
        headers, access = Headers(scope=scope), self.access
        if scope["method"] not in ("GET", "HEAD"):
            return _refused(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD: these pages change nothing")
        if not access.is_ours(headers.get("host", "")):
            return _refused(HTTPStatus.MISDIRECTED_REQUEST, "this server has another name; open the printed address")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return _refused(HTTPStatus.FORBIDDEN, "asked for by another site; type the address to open it")
        if access.token is None:
            return None
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token")
        if given is not None and access.has_token(given[0]):
            redirect = RedirectResponse("/", HTTPStatus.SEE_OTHER)
            redirect.set_cookie(access.cookie, access.token, httponly=True, samesite="strict")
            return redirect
        if not access.has_token(cookie_parser(headers.get("cookie", "")).get(access.cookie, "")):
            return _refused(HTTPStatus.UNAUTHORIZED, "open the printed address, with its token")
        return None


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _split_host(header: str) -> tuple[str, int | None]:
    """Name and port of a `Host` header, an IPv6 address without its brackets; ("", None) of anything else."""
    name, colon, port = header.strip().lower().rpartition(":")
    if not colon or header.endswith("]"):
        name, port = header.strip().lower(), ""
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    if port and not (port.isascii() and port.isdigit()):
        return "", None
    return name, int(port) if port else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _refused(status: HTTPStatus, reason: str) -> Response:
    return PlainTextResponse(f"{status.value} {status.phrase}: {reason}\n", status)
