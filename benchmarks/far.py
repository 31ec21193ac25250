"""Does every command survive an object store that fails, kills, and a second process that takes over?

Small runs on S3 (moto's server), each process behind a proxy of its own. In one try a request, or some, get a fault;
or the store is out of reach until the process ends; or the process, or one that it started, is killed at a request; or
a second one takes the folder over while the first works, or while it is stopped, and continues afterwards. Then the
same command again, until it succeeds. The bucket must then be that of an uninterrupted run: every byte of the store,
the records, the lists, the checkpoints, the images and features, and the same names. No checkpoint that was whole may
be gone meanwhile without a later one, nothing may be written by a process that has lost the folder, and none may end
with a traceback or with another exit code than that of a failure that passes.

python -m benchmarks.far --work FOLDER --out benchmarks/results/far.json
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import git_commit, report
from benchmarks.far_place import LIMIT_S, Bases, Place, Prepared
from benchmarks.far_process import LIBRARY, SHORT_S, Process
from benchmarks.far_proxy import KINDS as FAULTS
from benchmarks.far_proxy import Proxy, Request
from benchmarks.far_scenarios import Scenario, scenarios
from tests.object_store import object_store
from tests.processes import descendants, is_worker

KINDS = ("fault", "faults", "outage", "kill", "kill a worker", "take-over", "stopped")
_ORDER = (
    *("fault", "kill", "faults", "take-over", "faults", "stopped", "faults", "outage"),
    *("kill", "kill a worker", "faults", "take-over", "kill", "stopped", "fault", "faults"),
)
"""The kinds of a scenario's tries, again and again."""
_OFTEN = 0.2
"""Part of the requests that get a fault, where several do; not a refusal (403), which is not tried again."""
_PASSING = tuple(kind for kind in FAULTS if kind != "403")
_KILLS = 3
"""A command is killed so often at most, one start after another."""
_STARTS = 3
_SLOW_S = 0.2
"""Added to each request of a process that is taken over while it works."""
_TAKES_S = 3.0
"""Such a request waits for so long until the other one has the folder."""
_MAY_END = (0, 4, 75)
"""Exit codes of a command whose store fails: it passed, or can be run again. One fault alone passes, but for a 403."""
_KNOWS_S = 1.0
"""A process that lost the folder writes nothing after it has looked at the lease, or after this time."""
_LEASE = ".lease.json"
_CHECKPOINT = re.compile(r"trained/checkpoints/step-0*(\d+)[^/]*/state\.json")
_LAST_LINES = 600


@dataclass
class Try:
    """One disturbance and what came of it.

    Attributes:
        request: at which it happened, from 0; label: what was asked.
        how: the kind of fault, or of kill, or how the folder was taken over.
        codes: exit codes: of the disturbed process, of a second one, and of each start after them.
        blind: writes of a process that had lost the folder and could not know it yet.
        late: writes of one that could.
        wrong: ends that are no answer to a failure that passes, and checks that failed.
    """

    scenario: str
    kind: str
    number: int
    seed: int
    request: int = -1
    label: str = ""
    how: str = ""
    faults: int = 0
    kills: int = 0
    codes: list[int | None] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)
    lost_checkpoints: list[str] = field(default_factory=list)
    blind: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def stuck(self) -> bool:
        return self.codes[-1] != 0

    @property
    def good(self) -> bool:
        bad = (self.differences, self.leftovers, self.tracebacks, self.lost_checkpoints, self.late, self.wrong)
        return not self.stuck and not any(bad)


class Attempt:
    """One try: the disturbance, and starts until the end."""

    def __init__(self, place: Place, prepared: Prepared, one: Try):
        self._place, self._prepared, self._one = place, prepared, one
        self._chance = random.Random(f"{one.seed}/{one.scenario}/{one.kind}/{one.number}")
        self._command = prepared.scenario.command
        self._told = ""
        self._newest = 0

    def make(self) -> Try:
        one, place, chance = self._one, self._place, self._chance
        place.reset(self._prepared.objects, self._prepared.local)
        self._newest = newest_whole(place.objects())
        one.request = chance.randrange(len(self._prepared.requests))
        asked = self._prepared.requests[one.request]
        one.label = f"{asked.method} {asked.key}"
        if one.kind in ("take-over", "stopped"):
            self._taken_over()
        elif one.kind.startswith("kill"):
            self._killed()
        else:
            self._faulty()
        self._until_it_succeeds()
        if not one.stuck:
            found, expected = place.snapshot(), self._prepared.expected
            one.differences = sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name])
            one.differences += [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
            one.leftovers = sorted(found.keys() - expected.keys()) + place.left_behind(self._told)
        return one

    def _faulty(self) -> None:
        one, chance = self._one, self._chance
        dice = random.Random(chance.random())
        lasting = chance.choice(("reset", "refuse", "403", "500", "503"))
        one.how = {"fault": chance.choice(FAULTS), "faults": "several", "outage": lasting}[one.kind]

        def chosen(request: Request) -> str:
            if one.kind == "faults":
                return dice.choice(_PASSING) if dice.random() < _OFTEN else ""
            wanted = request.number >= one.request if one.kind == "outage" else request.number == one.request
            return one.how if wanted else ""

        with Proxy(self._place.upstream_port, chosen) as proxy:
            process = self._place.start([self._command], proxy)
            passes = one.kind == "fault" and one.how != "403"
            self._note(one.kind, process, process.wait(LIMIT_S), (0,) if passes else _MAY_END)
            one.faults = sum(bool(request.fault) for request in proxy.requests)

    def _killed(self) -> None:
        chance, first = self._chance, True
        for at in [self._one.request, *(chance.randrange(len(self._prepared.requests)) for _ in range(_KILLS - 1))]:
            kills = self._one.kills
            self._kill(at, self._command if first else self._again())
            if self._one.kills == kills or chance.random() < 0.5:
                return
            first = False

    def _kill(self, at: int, command: list[str]) -> None:
        one, chance, before = self._one, self._chance, self._one.kills
        one.how = chance.choice(("before its answer", "before it arrives", "and it never arrives"))
        worker = one.kind == "kill a worker"
        started: Future[Process] = Future()
        mutex = threading.Lock()

        def kill(request: Request) -> str:
            with mutex:
                if request.number < at or one.kills > before:
                    return ""
                driver = started.result(LIMIT_S).pid
                pids = sorted(pid for pid, line in descendants(driver).items() if is_worker(line))
                if worker and not pids:
                    return ""
                one.kills += 1
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(pids) if worker else driver, signal.SIGKILL)
                return "reset" if one.how == "and it never arrives" else ""

        with Proxy(self._place.upstream_port) as proxy:
            setattr(proxy, "after" if one.how == "before its answer" else "before", kill)
            started.set_result(process := self._place.start([command], proxy))
            self._note(one.kind, process, process.wait(LIMIT_S), _MAY_END if worker else (0, -signal.SIGKILL))

    def _taken_over(self) -> None:
        """A second process takes the folder while the first one works, or is stopped at a request."""
        one, chance, scenario = self._one, self._chance, self._prepared.scenario
        stopped = one.kind == "stopped"
        expires = stopped and (not scenario.takes_over or chance.random() < 0.5)
        held = chance.random() < 0.5  # the request is passed on only when the process goes on
        one.how = ("expired" if expires else "--take-over") + (", its request held" if stopped and held else "")
        started: Future[Process] = Future()
        reached, taken, goes_on = threading.Event(), threading.Event(), threading.Event()

        def at(request: Request) -> str:
            if request.number == one.request:
                if stopped:
                    started.result(LIMIT_S).send(signal.SIGSTOP)
                reached.set()
                if stopped and held:
                    goes_on.wait(LIMIT_S)
            elif request.number > one.request and not stopped:
                taken.wait(_TAKES_S)
                time.sleep(_SLOW_S)
            return ""

        def look(request: Request) -> str:
            if request.key == f"{scenario.folder}/{_LEASE}" and request.method == "PUT" and request.changed:
                taken.set()
            return ""

        with Proxy(self._place.upstream_port) as proxy, Proxy(self._place.upstream_port) as other:
            setattr(proxy, "before" if held else "after", at)
            other.after = look
            started.set_result(first := self._place.start([self._command], proxy))
            while not reached.wait(0.01) and not first.ended():
                pass
            if expires:
                time.sleep(SHORT_S["EXPIRE_S"] + 0.5)
            second = self._place.start([[*self._command, *["--take-over"] * (not expires)]], other, "second")
            code = second.wait(LIMIT_S)
            continued = time.monotonic() if stopped else 0.0
            goes_on.set()
            first.send(signal.SIGCONT)
            self._note("first", first, first.wait(LIMIT_S), _MAY_END)
            self._note("second", second, code, _MAY_END)
            one.blind, one.late = writes_after_loss(proxy.requests, other.requests, scenario.folder, continued)

    def _until_it_succeeds(self) -> None:
        for number in range(1, _STARTS + 1):
            with Proxy(self._place.upstream_port) as proxy:
                process = self._place.start([self._again()], proxy)
                self._note(f"start {number}", process, process.wait(LIMIT_S), (0,))
            if self._one.codes[-1] == 0:
                return

    def _again(self) -> list[str]:
        """The command for another start; after a failure it takes the folder over, or the lease has expired."""
        scenario = self._prepared.scenario
        with_option = scenario.takes_over and self._chance.random() < 0.5
        if not with_option and scenario.folder and self._one.codes[-1] != 0:
            time.sleep(SHORT_S["EXPIRE_S"] + 0.5)
        return [*self._command, *["--take-over"] * with_option]

    def _note(self, when: str, process: Process, code: int | None, allowed: tuple[int, ...]) -> None:
        one, output = self._one, process.output
        one.codes.append(code)
        self._told += output
        end = output.strip()[-_LAST_LINES:]
        if "Traceback (most recent call last)" in output:
            places = [line.strip() for line in output.splitlines() if line.lstrip().startswith("File ")]
            one.tracebacks.append(f"{when}: exit {code}: {' < '.join(places[:-4:-1])}: {end[-200:]}")
        elif code not in allowed:
            one.wrong.append(f"{when}: {'hung' if code is None else f'exit {code}'}: {end}")
        newest = newest_whole(self._place.objects())
        if newest < self._newest:
            one.lost_checkpoints.append(f"{when}: whole was that of step {self._newest}, then that of step {newest}")
        self._newest = max(newest, self._newest)


def newest_whole(objects: Mapping[str, bytes]) -> int:
    """The step of the newest whole checkpoint of the training, 0 if there is none."""
    steps = [0]
    for key, data in objects.items():
        if found := _CHECKPOINT.fullmatch(key):
            folder = key.rpartition("/")[0]
            files = json.loads(data)["files"]
            digests = {name: hashlib.sha256(objects.get(f"{folder}/{name}", b"")).hexdigest() for name in files}
            if all(digests[name] in json.dumps(entry) for name, entry in files.items()):
                steps.append(int(found[1]))
    return max(steps)


def writes_after_loss(
    first: list[Request], second: list[Request], folder: str, continued: float
) -> tuple[list[str], list[str]]:
    """What a process changed in a folder after another one had taken it over.

    Args:
        first, second: requests of the two.
        continued: when the first one went on, if it was stopped.
    Returns:
        Changes of a process that could not know it yet, as they were made within a second and before an answer about
        the lease; and the others.
    """
    lease = f"{folder}/{_LEASE}"
    taken = [r.answered for r in second if r.key == lease and r.method == "PUT" and r.changed and r.answered]
    had = [r.passed for r in first if r.key == lease and r.method == "PUT" and r.changed and r.passed]
    if not folder or not taken or not had or had[0] > taken[0]:
        return [], []  # the first one did not have the folder yet
    lost = max(taken[0], continued)
    looked = [r.answered for r in first if r.key == lease and r.began > taken[0] and r.answered]
    knows = min([*looked, lost + _KNOWS_S])
    writes = [r for r in first if r.changed and r.passed and r.passed > taken[0] and r.key.startswith(f"{folder}/")]
    labels = [(r.passed, f"{r.method} {r.key}") for r in writes if not r.key.startswith(f"{folder}/events/")]
    return (
        [label for at, label in labels if at and at <= knows],
        [label for at, label in labels if at and at > knows],
    )


def tries_of(name: str, scenario: Scenario, arguments: argparse.Namespace) -> Iterator[Try]:
    """The tries of a scenario: its kinds in turn."""
    possible = {
        "kill a worker": scenario.workers,
        "take-over": scenario.takes_over,
        "stopped": bool(scenario.folder),
    }
    order = [kind for kind in _ORDER if kind in arguments.kinds and possible.get(kind, True)]
    for number in range(arguments.most if order else 0):
        yield Try(name, order[number % len(order)], number, arguments.seed)


def main() -> None:
    names = list(scenarios(""))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs, better in memory (/dev/shm)")
    parser.add_argument("--most", type=int, default=40, help="tries of each scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenarios", nargs="*", default=names, choices=names)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    with object_store() as store:
        tries = run(Place(arguments.work, store), arguments)
    if not all(one.good for one in tries):
        sys.exit("not every run ended as an uninterrupted one")


def run(place: Place, arguments: argparse.Namespace) -> list[Try]:
    """All tries; those that an ended call at the same commit has made are read from WORK/tries-COMMIT.jsonl."""
    place.folder.mkdir(parents=True, exist_ok=True)
    done_file = place.folder / f"tries-{git_commit()}.jsonl"
    known = [json.loads(line) for line in done_file.read_text().splitlines()] if done_file.exists() else []
    done = {(one["scenario"], one["kind"], one["number"], one["seed"]): Try(**one) for one in known}
    bases = Bases(place)
    tries: list[Try] = []
    for name in arguments.scenarios:
        scenario = scenarios(place.store.url)[name]
        prepared: Prepared | None = None  # made for the first try that is not known
        began, before = time.monotonic(), len(tries)
        for one in tries_of(name, scenario, arguments):
            key = (one.scenario, one.kind, one.number, one.seed)
            if key not in done:
                prepared = prepared or bases.prepare(name, scenario)
                done[key] = Attempt(place, prepared, one).make()
                with done_file.open("a") as file:
                    file.write(json.dumps(asdict(done[key])) + "\n")
                if not done[key].good:
                    print(f"NOT GOOD {json.dumps(asdict(done[key]))}", flush=True)
            tries.append(done[key])
        made = tries[before:]
        good, seconds = sum(one.good for one in made), time.monotonic() - began
        asked = f"{len(prepared.requests)} requests" if prepared else "known"
        print(f"{name}: {asked}, {good} of {len(made)} as uninterrupted, {seconds:.0f} s", flush=True)
        if arguments.out is not None and tries:
            with contextlib.redirect_stdout(None):
                write(tries, arguments.out)  # after each scenario, so that it counts if this ends early
    write(tries, arguments.out)
    return tries


def write(tries: list[Try], out: Path | None) -> None:
    rows: list[dict[str, Any]] = []
    for (name, kind), group in itertools.groupby(sorted(tries, key=_row), key=_row):
        made = list(group)
        rows.append(
            {
                "scenario": name,
                "kind": kind,
                "tries": len(made),
                "faults": sum(one.faults for one in made),
                "kills": sum(one.kills for one in made),
                "as uninterrupted": sum(one.good for one in made),
                "differences": sum(bool(one.differences) for one in made),
                "checkpoints lost": sum(bool(one.lost_checkpoints) for one in made),
                "writes before it could know": sum(len(one.blind) for one in made),
                "late writes": sum(len(one.late) for one in made),
                "tracebacks": sum(bool(one.tracebacks) for one in made),
                "other ends": sum(bool(one.wrong) for one in made),
                "leftovers": sum(bool(one.leftovers) for one in made),
                "stuck": sum(one.stuck for one in made),
            }
        )
    kinds = Counter(one.kind for one in tries)
    ratio = {"tries that ended as an uninterrupted run / tries": sum(one.good for one in tries) / max(1, len(tries))}
    notes = [
        f"{len(tries)} tries: " + ", ".join(f"{kind} {number}" for kind, number in sorted(kinds.items())),
        f"{sum(one.faults for one in tries)} requests with a fault, {sum(one.kills for one in tries)} kills",
        f"S3 library: {LIBRARY}; shortened: " + ", ".join(f"{name} {value:g}" for name, value in SHORT_S.items()),
    ]
    report(
        "far", rows, ratio, out, packages=["imagen-precompute", "torch", "s3fs", "aiobotocore", "moto"], notes=notes
    )


def _row(one: Try) -> tuple[str, str]:
    return one.scenario, one.kind


if __name__ == "__main__":
    main()
