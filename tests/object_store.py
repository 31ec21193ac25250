"""An S3 server on loopback (moto), with faults on request."""

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock
from urllib.parse import parse_qs

ACCESS_KEY, SECRET_KEY = "AKIATESTACCESSKEY123", "a-very-secret-test-key-0987654321"
BUCKET = "bucket"


@dataclass
class Faults:
    """Which faults occur, as fractions of the requests."""

    errors: float = 0.0
    """Answered with 500 or 503, half of them after the request was carried out."""
    slow: float = 0.0
    """Answered after `slow_s`."""
    slow_s: float = 0.5
    rule: Callable[[str, str], str] = lambda method, path: ""
    """Of method and path with its query: a status such as `403` to answer with; `half` or `flip` of the body; `late`,
    500 after the request was carried out; or nothing."""
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    count: Counter[str] = field(default_factory=Counter)
    mutex: threading.Lock = field(default_factory=threading.Lock)

    def sample(self) -> tuple[str, bool]:
        with self.mutex:
            value, late = self.dice.random(), self.dice.random() < 0.5
            kind = "error" if value < self.errors else "slow" if value < self.errors + self.slow else "good"
            self.count[kind] += 1
            return kind, late


@dataclass(frozen=True, slots=True)
class Request:
    """One request that reached the server."""

    kind: str
    """`GET`, `HEAD`, `PUT`, `DELETE`, `LIST`, `POST` (a part of an upload, or several deletions)."""
    key: str
    """The object, or of a LIST the prefix."""
    bytes_sent: int
    """Length of the answer's body."""


@dataclass
class Requests:
    """What reached the server, in order."""

    seen: list[Request] = field(default_factory=list)

    def clear(self) -> None:
        self.seen.clear()

    def by_kind(self, prefix: str = "") -> Counter[str]:
        """Number of requests of each kind, of keys below a prefix."""
        return Counter(request.kind for request in self.seen if request.key.startswith(prefix))

    def bytes_sent(self, prefix: str = "") -> int:
        """Bytes of objects below a prefix that were sent."""
        return sum(r.bytes_sent for r in self.seen if r.kind == "GET" and r.key.startswith(prefix))


@dataclass(frozen=True)
class ObjectStore:
    url: str
    """`s3://...`, the prefix for a test."""
    endpoint: str
    faults: Faults
    environment: dict[str, str]
    requests: Requests

    def keys(self, prefix: str = "") -> dict[str, bytes]:
        """Every object below the prefix, by name."""
        import boto3

        client: Any = boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1")
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        names = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {n.removeprefix(prefix): client.get_object(Bucket=BUCKET, Key=n)["Body"].read() for n in names}


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A server with an empty bucket; credentials and address are in the environment meanwhile."""
    import boto3
    from moto.backends import get_backend
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_: object, **__: object) -> None:
            pass

    get_backend("s3").reset()  # this process has one for all servers
    faults, requests = Faults(), Requests()
    app = _counted(_faulty(DomainDispatcherApplication(create_backend_app), faults), requests)
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    environment = {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with mock.patch.dict(os.environ, environment):
        client: Any = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket=BUCKET)
        try:
            yield ObjectStore(f"s3://{BUCKET}", endpoint, faults, environment, requests)
        finally:
            server.shutdown()
            server.server_close()
            import s3fs

            s3fs.S3FileSystem.clear_instance_cache()


def _counted(app: Callable[..., Iterable[bytes]], requests: Requests) -> Callable[..., Iterable[bytes]]:
    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, query = environ["REQUEST_METHOD"], parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
        key = environ["PATH_INFO"].lstrip("/").removeprefix(BUCKET).lstrip("/")
        if "list-type" in query:
            method, key = "LIST", query.get("prefix", [""])[0]
        body = b"".join(app(environ, start_response))
        requests.seen.append(Request(method, key, len(body) if method != "HEAD" else 0))
        return [body]

    return answer


def _faulty(app: Callable[..., Iterable[bytes]], faults: Faults) -> Callable[..., Iterable[bytes]]:
    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        kind, late = faults.sample()
        path = f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}".rstrip("?")
        if kind == "good" and (rule := faults.rule(environ["REQUEST_METHOD"], path)):
            return _by_rule(rule, app, environ, start_response)
        if kind == "good":
            return app(environ, start_response)
        if kind == "slow":
            time.sleep(faults.slow_s)
            return app(environ, start_response)
        if late:
            b"".join(app(environ, lambda *_: lambda _: None))
        else:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response("503 Service Unavailable" if late else "500 Internal Server Error", [])
        return [b""]

    return answer


def _by_rule(
    rule: str, app: Callable[..., Iterable[bytes]], environ: dict[str, Any], start_response: Callable[..., Any]
) -> Iterable[bytes]:
    """The answer of a `Faults.rule`."""
    if rule.isdigit() or rule == "late":
        environ["wsgi.input"].read(0 if rule == "late" else int(environ.get("CONTENT_LENGTH") or 0))
        if rule == "late":
            b"".join(app(environ, lambda *_: lambda _: None))
        start_response({"403": "403 Forbidden", "503": "503 Slow Down"}.get(rule, "500 Internal Server Error"), [])
        return [b""]
    content = b"".join(app(environ, start_response))
    if rule == "half":
        return [content[: len(content) // 2]]
    return [content[:-1] + bytes([content[-1] ^ 1])] if content else [b""]
