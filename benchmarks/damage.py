"""Does damage stay visible?

Files of runs, stores, logs of removals, checkpoints and exports are damaged one at a time, and then every command that
writes is run on them. A file gets a flipped bit, a cut end, zeros or another file's content, or is deleted. Then the
command must refuse it by name, or what it made must be equal to what it makes without the damage, or `pipeline verify`
must still find the file: no sample with other content, no removed sample that is back, no traceback.

python -m benchmarks.damage --work FOLDER --out benchmarks/results/damage.json

Each try is a process of its own, whose result is a line of FOLDER/tries.jsonl: the same command goes on where it was
stopped.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.common import report
from imagen_core.store import Store
from tests.commands import Result
from tests.commands import call as call_cli
from tests.trained import BASE as TRAINING

FORMATS = ("parquet", "hdf5")
DAMAGES = ("flip", "cut", "zeros", "swap", "delete")
REMOVED = ("000000004", "000000011")
_ENCODERS = "encoders=[{name: t5, kind: t5, model: tiny-random-t5}, {name: other, kind: t5, model: tiny-random-t5}]"
_TRY_S = 300.0
_LOADED_ONCE = (
    "imagen_core",
    "pipeline",
    "stages",
    "workflows",
    "torch",
    "transformers",
    "pyarrow",
    "h5py",
    "webdataset",
)
GOOD = ("refused", "found by verify", "harmless")

KINDS = {
    "run": {
        "samples": r"store/samples/\d+\.",
        "images": r"store/images-16/\d+\.",
        "embeddings": r"store/text-t5/\d+\.",
        "null": r"store/text-t5/null\.safetensors",
        "probe": r"store/text-t5/probe\.json",
        "manifest": r"store/manifest\.json",
        "removal": r"store/removed/\d+\.json",
        "end of the log": r"store/removed/log\.json",
        "record": r"state/[^/]+/\d+\.json",
        "record of a shared file": r"state/text-t5/[a-z]\S*\.json",
        "settings of a group": r"state/[^/]+\.json",
        "drops": r"quarantine/\S+\.jsonl",
        "kept originals": r"staging/originals/\d+\.",
        "recorded input": r"input/",
        "settings of the run": r"(config\.yaml|plan\.json|summary\.json|events\S*)",
    },
    "training": {
        "weights": r"checkpoints/[^/]+/(model|ema\S*)\.safetensors",
        "state of the optimizer": r"checkpoints/[^/]+/\S*optim\S*",
        "state of a checkpoint": r"checkpoints/[^/]+/\S+\.json",
        "settings of the training": r"[^/]+\.(json|yaml|jsonl)",
    },
    "export": {"exported model": r"model\.safetensors"},
}
KINDS["store"] = {
    name: pattern.removeprefix("store/") for name, pattern in KINDS["run"].items() if pattern.startswith("store/")
}


@dataclass(frozen=True)
class Case:
    """One try: a file of this kind, in a copy of this place, damaged in this way, and then this command."""

    place: str
    store_format: str
    kind: str
    damage: str
    command: str


def commands(place: str, store_format: str, target: Path) -> dict[str, list[str]]:
    """The commands that write to a place, by name."""
    path = str(target)
    remove = {"remove": ["remove", path, "--key", "000000009"], "compact": ["remove", path, "--compact"]}
    if place == "store":
        return remove
    if place == "run":
        run = precompute(target, store_format)
        return {
            "run": run,
            "add rows": [*run, "source.num_samples=24"],
            "add a size": [*run, "images.sizes_px=[16,24]"],
            "add an encoder": [*run, _ENCODERS],
            "restart": [*run, "images.filter=box", "--restart"],
            **remove,
        }
    out = str(target / "exported.safetensors")
    if place == "export":
        return {"export": ["export", str(target / "model.safetensors"), "--out", out]}
    config = ["-c", str(target.parents[1] / "training.yaml")]
    resume = ["run", "train", *config, "--out", path, "--executor", "local", "--quiet", "num_steps=8"]
    return {"resume": resume, "export": ["export", path, "--out", out]}


def precompute(out: Path, store_format: str) -> list[str]:
    settings = ["source.num_samples=16", "shard_size=8", "images.sizes_px=[16]", "keep_originals=true"]
    command = ["run", "precompute", "--out", str(out), "--executor", "inline", "--quiet"]
    return [*command, f"store.format={store_format}", *settings]


def cases(seed: int, count: int | None) -> list[Case]:
    """Each combination once, in an order of the seed; again, with other files and places, where `count` is more."""
    found = [
        Case(place, store_format, kind, damage, command)
        for place in ("run", "store", "training", "export")
        for store_format in (FORMATS if place in ("run", "store") else FORMATS[:1])
        for kind in KINDS[place]
        for damage in DAMAGES
        for command in commands(place, store_format, Path("/x/y/z"))
    ]
    random.Random(seed).shuffle(found)
    count = len(found) if count is None else count
    return [found[number % len(found)] for number in range(count)]


def make_places(work: Path) -> list[str]:
    """Makes the undamaged places, below `work`/good, where they are not complete; returns the modules that it took."""
    good = work / "good"
    for store_format in FORMATS:
        run = good / f"run-{store_format}"
        if not (good / f"store-{store_format}").exists():
            shutil.rmtree(run, ignore_errors=True)
            _must(call(*precompute(run, store_format)))
            for key in REMOVED:
                _must(call("remove", str(run), "--key", key))
            shutil.copytree(run / "store", good / f"store-{store_format}.part")
            (good / f"store-{store_format}.part").rename(good / f"store-{store_format}")
    training = {"store": str(good / "run-parquet" / "store"), **TRAINING}
    (work / "training.yaml").write_text(yaml.safe_dump(training))
    if not (good / "export-parquet").exists():
        shutil.rmtree(good / "training-parquet", ignore_errors=True)
        command = ["run", "train", "-c", str(work / "training.yaml"), "--executor", "local", "--quiet"]
        _must(call(*command, "--out", str(good / "training-parquet")))
        model = good / "export.part" / "model.safetensors"
        shutil.rmtree(model.parent, ignore_errors=True)
        _must(call("export", str(good / "training-parquet"), "--out", str(model)))
        model.parent.rename(good / "export-parquet")
    _must(call(*precompute(work / "tries" / "warm-up", "hdf5")))
    _must(call("verify", str(good / "run-parquet")))
    return sorted(sys.modules)


def load_modules(names: list[str]) -> None:
    """Imports modules here once, for all tries. Nothing is run here: threads of libraries do not survive a fork."""
    assert isinstance(names, list), names
    for name in (name for name in names if name.partition(".")[0] in _LOADED_ONCE):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def call(*arguments: str) -> Result:
    """The command line in this process; with one thread, as sums of floats depend on their number, which encoding sets
    for the process."""
    torch.set_num_threads(1)
    return call_cli(*arguments)


def _must(result: Result) -> None:
    assert result.code == 0, result.err


def damage_file(root: Path, kind: str, place: str, how: str, chance: random.Random) -> str:
    """Damages a file of a kind, and returns its name; "" where there is none, or it stays as it was."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    of_kind = [name for name in names if re.match(KINDS[place][kind], name) and (root / name).stat().st_size]
    if not of_kind:
        return ""
    name = chance.choice(of_kind)
    path, before = root / name, (root / name).read_bytes()
    if how == "delete":
        path.unlink()
        return name
    data = bytearray(before)
    if how == "flip":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del data[chance.randrange(len(data)) :]
    elif how == "zeros":
        start = chance.choice([place for place in range(0, len(data), 16) if any(data[place : place + 4096])] or [0])
        data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    else:
        others = [other for other in of_kind if other != name] or [other for other in names if other != name]
        data = bytearray((root / chance.choice(others)).read_bytes()) if others else data
    path.write_bytes(data)
    return name if data != before else ""


def content(place: str, root: Path) -> dict[str, str]:
    """Digests of what users get from a place: of each sample by key, or of each weight file by name."""
    if place in ("training", "export"):
        files = [path for path in sorted(root.rglob("*.safetensors")) if "optim" not in path.name]
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    found = {}
    for sample in Store.open(root / "store" if place == "run" else root):
        digest = hashlib.sha256(repr((sample.captions, sample.url, sample.sha256)).encode())
        for arrays in (*([image] for image in sample.images.values()), *sample.text.values()):
            for array in arrays:
                digest.update(array.tobytes())
        found[sample.key] = digest.hexdigest()
    return found


def outcome(case: Case, root: Path, name: str, before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    """Runs the command and says what became of the damage; `detail` is what was printed, where that is not good."""
    result = call(*commands(case.place, case.store_format, root)[case.command])
    said = result.out + result.err
    is_named = _names(said, name)
    if "Traceback" in said:
        return {"outcome": "traceback", "detail": said}
    if case.place in ("training", "export"):
        found = content(case.place, root)
        other = {file for file, digest in found.items() if file != name and after.get(file, digest) != digest}
        if result.code:
            return {"outcome": "refused" if is_named else "refused without the name", "detail": said}
        lost = after.keys() - found.keys() - {name}
        return {"outcome": "other data" if other or lost else "harmless", "detail": f"{sorted(other)}, {sorted(lost)}"}
    checked = call("verify", str(root))
    said += checked.out + checked.err
    try:
        found = content(case.place, root)
    except ValueError as error:  # StoreError: readers refuse it
        said, found = f"{said}\n{error}", {}
    back = sorted(set(REMOVED) & found.keys())
    known = {key: {digests[key] for digests in (before, after) if key in digests} for key in found}
    other = sorted(key for key, digest in found.items() if digest not in known[key])
    if back:
        verdict = "removed samples back"
    elif checked.code == 0 and other:
        verdict = "other data"
    elif result.code:
        verdict = "refused" if is_named else "found by verify" if _names(said, name) else "refused without the name"
    elif checked.code:
        verdict = "found by verify" if _names(said, name) else "found without the name"
    else:
        verdict = "harmless" if dict(found) == dict(after) else "samples lost"
    return {"outcome": verdict, "detail": f"back {back}, other {other}, exit {result.code}, {checked.code}: {said}"}


def _names(text: str, name: str) -> bool:
    """Whether a text names a file, by its last two parts or more."""
    return "/".join(name.split("/")[-2:]) in text


def one_try(
    work: Path, number: int, seed: int, case: Case, before: Mapping[str, str], after: Mapping[str, str]
) -> dict[str, Any]:
    """The case on a copy of its place; what happened, for the list of tries.

    Args:
        before, after: what users get from the place before and after the command, without damage.
    """
    root = work / "tries" / f"{number:05d}"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(work / "good" / f"{case.place}-{case.store_format}", root)
    name = damage_file(root, case.kind, case.place, case.damage, random.Random(f"{seed}/{number}"))
    found = {"outcome": "no such file", "detail": ""}
    if name:
        try:
            found = outcome(case, root, name, before, after)
        except Exception:  # noqa: BLE001 - what a command should not end with
            found = {"outcome": "traceback", "detail": traceback.format_exc()}
    shutil.rmtree(root, ignore_errors=True)
    return {"number": number, **asdict(case), "file": name, **found}


def in_process(work: Callable[[], Any], folder: Path, timeout_s: float = _TRY_S) -> Any:
    """The JSON value that a function returns in a process of its own, or {"outcome": what went wrong}."""
    file = folder / "answer.json"
    file.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            value = work()
        except BaseException:  # noqa: BLE001 - the end of the process
            value = {"outcome": "traceback", "detail": traceback.format_exc()}
        file.write_text(json.dumps(value))
        os._exit(0)
    deadline = time.monotonic() + timeout_s
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"outcome": "hung", "detail": f"more than {timeout_s:g} s"}
        time.sleep(0.01)
    if done[1] or not file.exists():
        return {"outcome": "crash", "detail": f"status {done[1]}"}
    return json.loads(file.read_text())


class Expected:
    """What users get from each place before and after each command, without damage; made when it is first needed."""

    def __init__(self, work: Path):
        self._work = work
        self._found: dict[tuple[str, str, str], dict[str, str]] = {}

    def of(self, case: Case, command: str = "") -> dict[str, str]:
        """After a command on the case's place; before any without one."""
        key = (case.place, case.store_format, command)
        if key not in self._found:
            value = in_process(lambda: self._make(*key), self._work)
            assert "outcome" not in value, value
            self._found[key] = value
        return self._found[key]

    def _make(self, place: str, store_format: str, command: str) -> dict[str, str]:
        good, root = self._work / "good" / f"{place}-{store_format}", self._work / "tries" / "expected"
        if not command:
            return content(place, good)
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(good, root)
        _must(call(*commands(place, store_format, root)[command]))
        return content(place, root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, help="number of damages; default: each combination once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    (work / "tries").mkdir(parents=True, exist_ok=True)
    (work / "good").mkdir(exist_ok=True)
    load_modules(in_process(lambda: make_places(work), work, 3600))
    expected = Expected(work)
    log = work / "tries.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    results = {entry["number"]: entry for entry in done if entry["seed"] == arguments.seed}
    planned = cases(arguments.seed, arguments.tries)
    for number, case in enumerate(planned):
        if number not in results:
            both = expected.of(case), expected.of(case, case.command)
            answer = in_process(lambda n=number, c=case, b=both: one_try(work, n, arguments.seed, c, *b), work)
            results[number] = {"number": number, **asdict(case), "file": "", **answer, "seed": arguments.seed}
            with log.open("a") as lines:
                lines.write(json.dumps(results[number]) + "\n")
        if number % 20 == 19 or number + 1 == len(planned):
            print(
                f"{number + 1} of {len(planned)}: {dict(Counter(r['outcome'] for r in results.values()))}", flush=True
            )
            write([results[n] for n in range(number + 1)], arguments.out)
    bad = [entry for entry in results.values() if entry["outcome"] not in (*GOOD, "no such file")]
    for entry in bad[:50]:
        print(json.dumps({**entry, "detail": entry["detail"][-600:]}, indent=1))
    if bad:
        sys.exit(f"{len(bad)} damages are neither refused by name, nor found, nor harmless")


def write(results: Sequence[Mapping[str, Any]], out: Path | None) -> None:
    """Counts by place, kind of file and command."""
    tried = [entry for entry in results if entry["outcome"] != "no such file"]
    rows: dict[tuple[str, str, str], Counter[str]] = {}
    for entry in tried:
        rows.setdefault((entry["place"], entry["kind"], entry["command"]), Counter())[entry["outcome"]] += 1
    bad = [entry for entry in tried if entry["outcome"] not in GOOD]
    columns = [*GOOD, *sorted({entry["outcome"] for entry in bad})]
    report(
        "damage",
        [
            {"place": place, "file": kind, "command": command, **{column: counts[column] for column in columns}}
            for (place, kind, command), counts in sorted(rows.items())
        ],
        {"damages refused by name, found by verify or harmless / damages": 1 - len(bad) / max(1, len(tried))},
        out,
        packages=["imagen-precompute", "pyarrow", "h5py", "safetensors"],
        notes=[
            f"{len(tried)} damages: "
            + ", ".join(f"{n} {name}" for name, n in Counter(entry["damage"] for entry in tried).most_common()),
            *(f"{e['outcome']}: {e['damage']} of {e['file']}, then {e['command']}" for e in bad[:20]),
        ],
    )


if __name__ == "__main__":
    main()
