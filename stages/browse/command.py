"""`pipeline browse`: serves the pages until Ctrl-C."""

import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence

from pipeline.commands import CommandResult
from pipeline.errors import ConfigError, MachineError
from stages.browse.places import find_places

_PACKAGES = ("starlette", "uvicorn", "duckdb")
_INSTALL = "pip install '.[browse]' in the checkout, or pip install starlette uvicorn duckdb"


def browse_command(
    paths: Sequence[str], *, port: int = 0, host: str = "127.0.0.1", open_browser: bool = True
) -> CommandResult:
    """Serves pages about runs, stores, trainings, samplings and evaluations; returns at Ctrl-C.

    Args:
        paths: local folders or URLs; none means the folders in `runs`.
        port: 0 means a free one.
        host: the address to listen on; another one than of this machine itself requires a token, which is in the
            printed URL.
    Raises:
        ConfigError: a path is nothing that can be shown, or the address is taken or not this machine's.
        MachineError: a package is missing, or a URL cannot be reached.
    """
    _check_packages()
    from stages.browse.security import Access

    places = find_places(paths)
    listener = _listen(host, port)
    access = Access.to(host, listener.getsockname()[1])
    print(f"{access.url}  Ctrl-C ends it", flush=True)
    if open_browser:
        threading.Thread(target=webbrowser.open, args=(access.url,), daemon=True).start()
    _serve(listener, places, access)
    return {"url": access.url}, [], 0


def _serve(listener: socket.socket, places: Sequence, access: object) -> None:
    import uvicorn

    from stages.browse.app import make_app

    config = uvicorn.Config(
        make_app(places, access),  # pyright: ignore[reportArgumentType]
        log_level="critical",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or it would leave its temporary files
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        print("ended", file=sys.stderr)


def _check_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise MachineError(f"browse: {', '.join(missing)} is not installed; {_INSTALL}")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(64)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error.strerror or error}; give others") from error
    return listener
