"""The bucket and the folders that `far.py` works in, and what is there before each scenario."""

import json
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.far_process import Process, environment
from benchmarks.far_proxy import Proxy, Request
from benchmarks.far_scenarios import Scenario, write_input
from benchmarks.faults import comparable
from tests.object_store import BUCKET, ObjectStore

LIMIT_S = 300.0
"""A process that takes longer hangs."""
_TRIES = 5
_LIST_OF_SENT = re.compile(r"/\.sent-\d+\.json$")


class Place:
    """A bucket, and folders on this machine: `work`, where commands run, and one for temporary files."""

    def __init__(self, folder: Path, store: ObjectStore):
        import boto3

        self.folder, self.store = folder.absolute(), store
        self.work, self.temporary = self.folder / "work", self.folder / "tmp"
        self.upstream_port = int(store.endpoint.rpartition(":")[2])
        self._client: Any = boto3.client("s3", endpoint_url=store.endpoint, region_name="us-east-1")

    def put(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def objects(self) -> dict[str, bytes]:
        from botocore.exceptions import BotoCoreError, ClientError

        for _ in range(_TRIES):
            with suppress(BotoCoreError, ClientError):  # a request of a killed process may still be at work
                return self.store.keys()
            time.sleep(1.0)
        return self.store.keys()

    def reset(self, objects: Mapping[str, bytes], local: Path | None) -> None:
        for path in (self.work, self.temporary):
            shutil.rmtree(path, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        self.work.mkdir() if local is None else shutil.copytree(local, self.work)
        there = self.objects()
        for key in there.keys() - objects.keys():
            self._client.delete_object(Bucket=BUCKET, Key=key)
        for key, data in objects.items():
            if there.get(key) != data:
                self.put(key, data)

    def snapshot(self) -> dict[str, bytes]:
        """What is there by name, in the bucket and where the commands ran, without what differs from run to run."""
        found = {key: data for key, data in self.objects().items() if "/events/" not in key}
        for key in list(filter(_LIST_OF_SENT.search, found)):  # a folder has one; its number is that of the starts
            del found[key]
            found[_LIST_OF_SENT.sub("/.sent.json", key)] = b""
        found |= {f"local {p.relative_to(self.work)}": p.read_bytes() for p in self.work.rglob("*") if p.is_file()}
        return {name: comparable(name, lambda d=data: d) for name, data in found.items()}

    def left_behind(self, told: str) -> list[str]:
        """Temporary files and folders that no process named in what it printed."""
        above = set(self.temporary.glob("imagen-precompute-*"))
        found = {path for folder in (*above, self.temporary) for path in folder.iterdir()} - above
        return sorted(f"$TMPDIR/{path.relative_to(self.temporary)}" for path in found if path.name not in told)

    def start(self, commands: list[list[str]], proxy: Proxy, name: str = "output") -> Process:
        variables = environment(proxy.endpoint, self.store.environment, self.temporary)
        return Process(commands, variables, self.work, self.folder / f"{name}.txt")

    def run(self, commands: list[list[str]]) -> tuple[int | None, str, list[Request]]:
        """Runs commands without a fault: exit code, output, requests."""
        with Proxy(self.upstream_port) as proxy:
            process = self.start(commands, proxy)
            return process.wait(LIMIT_S), process.output, proxy.requests


@dataclass
class Prepared:
    """A scenario, ready for tries.

    Attributes:
        objects, local: what is there before it.
        expected: what is there after it; requests: those of an uninterrupted run.
    """

    name: str
    scenario: Scenario
    objects: Mapping[str, bytes]
    local: Path
    expected: dict[str, bytes]
    requests: list[Request]


class Bases:
    """What is there before each scenario; made once for all that need the same."""

    def __init__(self, place: Place):
        self.place = place
        self._made: dict[str, tuple[dict[str, bytes], Path]] = {}

    def prepare(self, name: str, scenario: Scenario) -> Prepared:
        """Makes what a scenario begins with, and runs it without a fault."""
        objects, local = self._base(scenario.base)
        self.place.reset(objects, local)
        code, output, requests = self.place.run([scenario.command])
        assert code == 0, f"{name}: exit {code}: {output}"
        left = self.place.left_behind("")
        assert not left, f"{name}: an uninterrupted run left {left}"
        return Prepared(name, scenario, objects, local, self.place.snapshot(), requests)

    def _base(self, commands: list[list[str]]) -> tuple[dict[str, bytes], Path]:
        key = json.dumps(commands)
        if key not in self._made:
            if commands:
                self.place.reset(*self._base(commands[:-1]))
                code, output, _ = self.place.run(commands[-1:])
                assert code == 0, f"{commands[-1]}: exit {code}: {output}"
            else:
                self.place.reset({}, None)
                write_input(self.place.work, self.place.put, self.place.store.url)
            local = self.place.folder / "bases" / str(len(self._made))
            shutil.rmtree(local, ignore_errors=True)
            shutil.copytree(self.place.work, local)
            self._made[key] = (self.place.objects(), local)
        return self._made[key]
