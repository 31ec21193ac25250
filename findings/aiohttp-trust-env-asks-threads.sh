#!/usr/bin/env bash
# aiohttp with trust_env=True hands every request to a thread twice, also without a proxy and without a ~/.netrc.
#
# In aiohttp 3.14.5 a session that trusts the environment looks for a proxy and for a netrc entry once per request, each
# by `run_in_executor`, whatever the last request to the same server found. 200 requests to one server on loopback make
# 400 such calls, without trust_env none. Each is a hand-over to a thread and back: in a client of hundreds of requests a
# second to one server it was a visible part of the event loop's time, and the two calls wait where other work fills the
# default pool of threads. stages/captioners/server.py looks the proxy up once per server instead.
#
# Fails if it is not as seen on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check aiohttp==3.14.5
cd "$folder"
unset NETRC
HOME="$folder" no_proxy="*" "$folder/venv/bin/python" - <<'PYTHON'
import asyncio

import aiohttp
from aiohttp import web

REQUESTS = 200


async def handed_over(url, **settings):
    """Calls of run_in_executor during the requests, after one that opens the connection."""
    loop, calls = asyncio.get_running_loop(), []
    plain = loop.run_in_executor

    def counted(executor, function, *arguments):
        calls.append(function)
        return plain(executor, function, *arguments)

    async with aiohttp.ClientSession(**settings) as session:
        await (await session.get(url)).read()
        loop.run_in_executor = counted
        for _ in range(REQUESTS):
            await (await session.get(url)).read()
        loop.run_in_executor = plain
    return calls


async def main():
    async def answer(request):
        return web.Response(text="ok")

    application = web.Application()
    application.router.add_get("/", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
    for trusts in (False, True):
        calls = await handed_over(url, trust_env=trusts)
        print(f"trust_env={trusts}: {len(calls)} calls for {REQUESTS} requests")
        assert len(calls) == (2 * REQUESTS if trusts else 0)
    await runner.cleanup()


asyncio.run(main())
PYTHON
