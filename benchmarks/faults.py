"""Does every command survive a fault at every point where it writes?

Small runs, each with one fault: the process ends (exit), the disk is full until it ends (full), one call fails (eio),
or the power goes and takes what was not synced (power). Then `status`, and the same command again in a new process, up
to three times, until it succeeds. The folder must then be that of an uninterrupted run: every byte of the store, the
records, the lists and the checkpoints, and the same names, also in the folder for temporary files.

python -m benchmarks.faults --work FOLDER --out benchmarks/results/faults.json
"""

import argparse
import contextlib
import gc
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.common import git_commit, report
from benchmarks.fault_points import KINDS, FaultPoints
from benchmarks.fault_scenarios import SCENARIOS, Scenario

_LIMIT_S = 120.0
_STARTS = 3
_UNCOMPARED = (".lock", "events.jsonl", "starts.jsonl", "report/index.html")
"""Files with times in them: that they are there is enough."""
_VOLATILE = (
    "seconds",
    "this_run",
    "shards_skipped",
    "changed_settings",
    "images_per_s",
    "generated_now",
    "seconds_per_image",
    "loader_wait",
    "peak_memory_bytes",
    "time",
)


@dataclass
class Ended:
    """How a process ended: exit code (None: it hung, and was killed), what it printed, the points it passed, and the
    modules it imported."""

    code: int | None
    output: str
    points: list[str]
    modules: list[str]

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.output


@dataclass
class Try:
    """One fault and what came of it."""

    scenario: str
    kind: str
    point: int
    label: str
    seed: int
    codes: list[int | None] = field(default_factory=list)
    """Exit codes: with the fault, and of each start after it."""
    differences: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)

    @property
    def stuck(self) -> bool:
        """Whether the second start, or the last one, did not succeed."""
        return self.codes[-1] != 0

    @property
    def good(self) -> bool:
        return not (self.stuck or self.differences or self.leftovers or self.tracebacks)


class Place:
    """The folders of one benchmark: `work` is where commands run, always under the same path, as it is recorded."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        self.work, self.temporary, self.shadow = (self.folder / name for name in ("work", "tmp", "shadow"))

    def reset(self, base: Path | None) -> None:
        for path in (self.work, self.temporary, self.shadow):
            shutil.rmtree(path, ignore_errors=True)
        if base is None:
            self.work.mkdir(parents=True)
        else:
            shutil.copytree(base, self.work, symlinks=True)
        self.temporary.mkdir()
        self.shadow.mkdir()

    def left_behind(self) -> list[str]:
        """What is in the folder for temporary files, but for the folder that all processes of a user share."""
        found = (path.relative_to(self.temporary).as_posix() for path in self.temporary.rglob("*"))
        return [f"$TMPDIR/{name}" for name in found if name != f"imagen-precompute-{os.getuid()}"]

    def start(
        self, commands: list[list[str]], kind: str = "", at: int = -1, seed: int = 0, *, before: Callable[..., Any]
    ) -> Ended:
        """Runs commands in a forked process until one fails."""
        output, left = self.folder / "output.txt", self.folder / "ended.json"
        left.unlink(missing_ok=True)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            self._in_child(commands, FaultPoints([self.work, self.temporary], self.shadow, kind, at, seed), before)
        code = _wait(child)
        known = json.loads(left.read_text()) if left.exists() else {"points": [], "modules": []}
        return Ended(code, output.read_text(errors="replace"), **known)

    def _in_child(self, commands: list[list[str]], points: FaultPoints, before: Callable[..., Any]) -> None:
        code = 1
        try:
            log = os.open(self.folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.chdir(self.work)
            os.environ["TMPDIR"] = tempfile.tempdir = str(self.temporary)
            before()
            points.install()
            code = 0
            for command in commands:
                code = call(command)
                if code:
                    break
            gc.collect()
            weakref.finalize._exitfunc()  # type: ignore[attr-defined]
        except BaseException:  # noqa: BLE001 - the end of a process
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            modules = [name for name in sys.modules if not name.startswith("__")]
            (self.folder / "ended.json").write_text(json.dumps({"points": points.labels, "modules": modules}))
            os._exit(code)


def call(arguments: list[str]) -> int:
    """The command line in this process."""
    from pipeline.cli import main as cli

    sys.argv = ["pipeline", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        return 1
    return 0


def _wait(child: int) -> int | None:
    """The exit code of a child; None for one that hung."""
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.003)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def snapshot(folder: Path) -> dict[str, bytes]:
    """The files below a folder, without what differs from run to run."""
    return {
        path.relative_to(folder).as_posix(): comparable(path.as_posix(), path.read_bytes)
        for path in sorted(folder.rglob("*"))
        if path.is_file() or path.is_symlink()
    }


def comparable(name: str, read: Callable[[], bytes]) -> bytes:
    """What a file of a run holds, without what differs from run to run."""
    if name.endswith(_UNCOMPARED):
        return b""
    data = read()
    if name.endswith("metrics.jsonl"):
        return json.dumps([json.loads(line).get("step") for line in data.splitlines()]).encode()
    if name.endswith("summary.json"):
        return json.dumps(_lasting(json.loads(data)), sort_keys=True).encode()
    return data


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(item) for key, item in value.items() if key not in _VOLATILE}
    return value


class FixedTime(datetime):
    """The log of removals has times in it."""

    @classmethod
    def now(cls, tz: Any = None) -> "FixedTime":
        return cls(2026, 1, 1, tzinfo=tz or UTC)


def fix_time() -> None:
    import stages.store_tools.remove as remove

    remove.datetime = FixedTime  # type: ignore[misc]


def load_modules(place: Place, names: list[str]) -> None:
    """Imports into this process what the commands import, once for all tries. It runs none of them itself: threads,
    which libraries start when they compute, do not survive a fork."""
    kinds = {name.split()[0]: name for name in names}
    for scenario in (SCENARIOS[name] for name in kinds.values()):
        place.reset(None)
        scenario.prepare(place.work)
        for name in place.start([*scenario.base, *scenario.commands], before=fix_time).modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()


@dataclass
class Prepared:
    """A scenario, ready for faults."""

    scenario: Scenario
    base: Path
    expected: dict[str, bytes]
    points: list[str]


def prepare(place: Place, name: str, scenario: Scenario) -> Prepared:
    """Makes the folder that a scenario begins with, and runs it without a fault."""
    place.reset(None)
    scenario.prepare(place.work)
    if scenario.base:
        made = place.start(scenario.base, before=fix_time)
        assert made.code == 0, f"{name}: exit {made.code}: {made.output}"
    scenario.change(place.work)
    base = place.folder / "bases" / name
    shutil.rmtree(base, ignore_errors=True)
    shutil.copytree(place.work, base, symlinks=True)
    place.reset(base)
    ended = place.start(scenario.commands, before=fix_time)
    assert ended.code == 0, f"{name}: exit {ended.code}: {ended.output}"
    left = place.left_behind()
    assert not left, f"{name}: an uninterrupted run left {left}"
    return Prepared(scenario, base, snapshot(place.work), ended.points)


def attempt(place: Place, prepared: Prepared, fault: Try) -> Try:
    """One fault, and starts until the end."""
    scenario = prepared.scenario
    place.reset(prepared.base)
    ended = place.start(scenario.commands, fault.kind, fault.point, fault.seed, before=fix_time)
    fault.codes.append(ended.code)
    _note(fault, "fault", ended)
    for number in range(1, _STARTS + 1):
        looked = place.start([scenario.status] if scenario.status else [], before=fix_time)
        if looked.traceback:
            _note(fault, f"status {number}", looked)
        again = place.start(scenario.commands, before=fix_time)
        fault.codes.append(again.code)
        _note(fault, f"start {number}", again)
        if again.code == 0:
            break
    if not fault.stuck:
        found = snapshot(place.work)
        both = found.keys() & prepared.expected.keys()
        fault.differences = [name for name in both if found[name] != prepared.expected[name]]
        fault.differences += [f"{name} is missing" for name in prepared.expected.keys() - found.keys()]
        fault.leftovers = sorted(found.keys() - prepared.expected.keys())
        fault.leftovers += place.left_behind()
    return fault


def _note(fault: Try, when: str, ended: Ended) -> None:
    if ended.traceback or ended.code is None:
        lines = [line for line in ended.output.splitlines() if line.strip()]
        place = next((line.strip() for line in reversed(lines) if line.lstrip().startswith("File ")), "")
        fault.tracebacks.append(f"{when}: {place}: {lines[-1] if lines else 'hung'}")
    elif when == "fault" and fault.kind == "full" and ended.code not in (0, 4):
        fault.tracebacks.append(f"{when}: exit {ended.code} instead of 4: {ended.output[-400:]}")
    elif when != "fault" and ended.code != 0:
        fault.tracebacks.append(f"{when}: exit {ended.code}: {ended.output[-400:]}")


def faults_of(prepared: Prepared, name: str, kinds: list[str], chance: random.Random, most: int) -> Iterator[Try]:
    """The faults of a scenario: each kind at each point, or `most` of them; which kinds then come to a point is by
    chance, and no point has one more than another before it."""
    orders = [chance.sample(kinds, len(kinds)) for _ in prepared.points]
    every = [
        Try(name, orders[point][turn], point, prepared.points[point], chance.randrange(1 << 30))
        for turn in range(len(kinds))
        for point in chance.sample(range(len(prepared.points)), len(prepared.points))
    ]
    yield from sorted(every[:most], key=lambda fault: (fault.point, fault.kind))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs, better in memory (/dev/shm)")
    parser.add_argument("--most", type=int, default=1 << 30, help="most faults of a scenario; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenarios", nargs="*", default=list(SCENARIOS), choices=list(SCENARIOS))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    tries = run(Place(arguments.work), arguments)
    if not all(one.good for one in tries):
        sys.exit("not every run ended as an uninterrupted one")


def run(place: Place, arguments: argparse.Namespace) -> list[Try]:
    """All tries; those that an ended call at the same commit has made are read from WORK/tries-COMMIT.jsonl."""
    place.folder.mkdir(parents=True, exist_ok=True)
    done_file = place.folder / f"tries-{git_commit()}.jsonl"
    known = [json.loads(line) for line in done_file.read_text().splitlines()] if done_file.exists() else []
    done = {(one["scenario"], one["kind"], one["point"], one["seed"]): Try(**one) for one in known}
    load_modules(place, arguments.scenarios)
    tries: list[Try] = []
    for name in arguments.scenarios:
        prepared = prepare(place, name, SCENARIOS[name])
        began, before = time.monotonic(), len(tries)
        chance = random.Random(f"{arguments.seed}/{name}")
        for fault in faults_of(prepared, name, arguments.kinds, chance, arguments.most):
            key = (fault.scenario, fault.kind, fault.point, fault.seed)
            if key not in done:
                done[key] = attempt(place, prepared, fault)
                with done_file.open("a") as file:
                    file.write(json.dumps(vars(done[key])) + "\n")
                if not done[key].good:
                    print(f"NOT GOOD {json.dumps(vars(done[key]))}", flush=True)
            tries.append(done[key])
        made = tries[before:]
        good = sum(one.good for one in made)
        seconds, points = time.monotonic() - began, len(prepared.points)
        print(f"{name}: {points} points, {good} of {len(made)} as uninterrupted, {seconds:.0f} s", flush=True)
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
                "fault": kind,
                "tries": len(made),
                "as uninterrupted": sum(one.good for one in made),
                "differences": sum(bool(one.differences) for one in made),
                "stuck": sum(one.stuck for one in made),
                "tracebacks": sum(bool(one.tracebacks) for one in made),
                "leftovers": sum(bool(one.leftovers) for one in made),
            }
        )
    kinds = Counter(one.kind for one in tries)
    ratio = {"tries that ended as an uninterrupted run / tries": sum(one.good for one in tries) / max(1, len(tries))}
    notes = [f"{len(tries)} tries: " + ", ".join(f"{kind} {number}" for kind, number in sorted(kinds.items()))]
    report("faults", rows, ratio, out, packages=["imagen-precompute", "torch", "pyarrow", "h5py"], notes=notes)


def _row(one: Try) -> tuple[str, str]:
    return one.scenario, one.kind


if __name__ == "__main__":
    main()
