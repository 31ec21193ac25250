"""How long does a whole small job take, from the command to the store, and how much of it is the start?

JPEGs of 1024 x 768 with captions, from a web server of this machine, to 64 and 256 px and float32 embeddings of an
encoder of t5-v1_1-small's shape. Ours on Ray and on local processes, at this commit and at an earlier one that is
unpacked into the work folder, and what people write today: img2dataset to tars, then transformers in batches of 32 and
Pillow. All in each round, in turns. What a round has measured stays in the work folder, and a further start goes on
behind it.

The processor time of each process is read from /proc while it runs (Linux); that of the start is what no task of the
run used: Python, packages, Ray, models.

    python -m benchmarks.job --earlier 1ec2329 --work evidence-run/job --out benchmarks/results/job.json
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.common import report
from benchmarks.download import Handler, Server
from benchmarks.earlier import ROOT, unpack
from benchmarks.encode import shuffled_prompts, write_model
from benchmarks.input import Rounds, pipeline

SIZE = (1024, 768)
SIZES_PX = (64, 256)
DISTINCT = 100
"""Images that differ; the server gives them in turn."""
THREADS = 16
LAST_GROUP = "text-t5"
TARGETS = {"peer": 4.0, "earlier": 2.0}
"""Seconds of the other, over ours."""
FIRST_SHARD_S = {"ray": 8.0, "local": 4.0}
_POLL_S = 0.05
_TICKS = os.sysconf("SC_CLK_TCK")

PEER = """
import glob, io, os, sys, tarfile
import numpy as np
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

def main(urls, model, out, shard_size, threads):
    from img2dataset import download
    download(
        url_list=urls, input_format="parquet", url_col="url", caption_col="caption", output_format="webdataset",
        output_folder=out + "/tars", number_sample_per_shard=shard_size, resize_mode="no", disable_all_reencoding=True,
        processes_count=len(os.sched_getaffinity(0)), thread_count=threads, enable_wandb=False,
    )
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, T5EncoderModel
    tokenizer, encoder = AutoTokenizer.from_pretrained(model), T5EncoderModel.from_pretrained(model).eval()
    images = 0
    for path in sorted(glob.glob(out + "/tars/*.tar")):
        captions, small = [], {64: [], 256: []}
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".txt"):
                    captions.append(tar.extractfile(member).read().decode())
                elif not member.name.endswith(".json"):
                    image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
                    side = min(image.size)
                    left, top = (image.width - side) // 2, (image.height - side) // 2
                    image = image.crop((left, top, left + side, top + side))
                    for size, made in small.items():
                        made.append(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))
                    images += 1
        for size, made in small.items():
            np.save(path + f".{size}.npy", np.stack(made))
        embeddings = []
        with torch.inference_mode():
            for first in range(0, len(captions), 32):
                batch = tokenizer(captions[first:first + 32], padding="longest", truncation=True, max_length=128,
                                  return_tensors="pt")
                embeddings.append(encoder(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state)
        torch.save([states.numpy() for states in embeddings], path + ".t5.pt")
    print(images)

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
"""


class JobHandler(Handler):
    """Gives the images in turn."""

    images: tuple[bytes, ...] = ()

    def do_GET(self) -> None:
        self.image = self.images[int(self.path.strip("/").split(".")[0]) % len(self.images)]
        super().do_GET()


def serve(folder: Path, port: Connection) -> None:
    JobHandler.images = tuple(path.read_bytes() for path in sorted(folder.glob("*.jpg")))
    with Server(("127.0.0.1", 0), JobHandler) as server:
        port.send(server.server_port)
        server.serve_forever()


def write_images(folder: Path, seed: int) -> None:
    """JPEGs of smooth colours with grain, some 200 kB each as photographs have."""
    folder.mkdir(parents=True, exist_ok=True)
    width, height = SIZE
    for number in range(DISTINCT):
        path = folder / f"{number:04d}.jpg"
        if not path.exists():
            dice = np.random.default_rng((seed, number))
            coarse = Image.fromarray(dice.integers(0, 256, (6, 8, 3), np.uint8))
            smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
            grainy = smooth + dice.integers(-12, 13, (height, width, 1), np.int16)
            part = path.with_suffix(".part")
            Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(part, "JPEG", quality=90)
            part.rename(path)


class Processes:
    """The processor time of a process and of all that descend from it, by what they call themselves."""

    def __init__(self, root: int):
        self.seconds: Counter[str] = Counter()
        self._root = root
        self._seen: dict[tuple[int, str], float] = {}
        """Process id and start time -> CPU seconds so far."""
        self._pids: set[int] = {root}

    def look(self) -> None:
        """Reads the times now. What a process uses between the last look and its end is lost."""
        parents: dict[int, int] = {}
        times: dict[int, tuple[str, float]] = {}
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                try:
                    fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                except OSError:  # it has just ended
                    continue
                parents[int(entry.name)] = int(fields[1])
                times[int(entry.name)] = fields[19], (int(fields[11]) + int(fields[12])) / _TICKS
        self._pids &= parents.keys()
        while found := {pid for pid, parent in parents.items() if parent in self._pids} - self._pids:
            self._pids |= found
        for pid in self._pids:
            started, seconds = times[pid]
            before = self._seen.get((pid, started), 0.0)
            if seconds > before:
                self.seconds[_role(pid, parents[pid], self._root)] += seconds - before
                self._seen[pid, started] = seconds


def _role(pid: int, parent: int, root: int) -> str:
    if pid == root:
        return "driver"
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").split()
    except OSError:
        return "ended"
    line = " ".join(words)
    named = {
        "raylet/raylet": "raylet",
        "gcs_server": "gcs_server",
        "multiprocessing.forkserver": "fork server" if parent == root else "forked worker",
        "multiprocessing.spawn": "spawned worker",
        "resource_tracker": "resource tracker",
        "default_worker.py": "ray worker, starting",
    }
    found = next((role for part, role in named.items() if part in line), "")
    return found or (words[0] if words and words[0].startswith("ray::") else Path(words[0] if words else "?").name)


def measure(command: list[str], checkout: Path, run: Path | None = None) -> dict[str, Any]:
    """Seconds of a command, those until its run had its first finished shard, and processor time by process.

    Raises:
        SystemExit: it failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout), "no_proxy": "*"}
    environment.pop(
        "PYTHONDONTWRITEBYTECODE", None
    )  # or each process compiles the sources, which no installation does
    log = (run or Path(command[1])).with_suffix(".log")
    began, first = time.perf_counter(), None
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    processes = Processes(process.pid)
    try:
        while process.poll() is None:
            processes.look()
            if first is None and run is not None and any((run / "state" / LAST_GROUP).glob("[0-9]*.json")):
                first = time.perf_counter() - began
            time.sleep(_POLL_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:6])}: exit {process.returncode}\n{log.read_text()[-3000:]}")
    total = sum(processes.seconds.values())
    found: dict[str, Any] = {"seconds": round(seconds, 2), "cpu s": round(total, 2)}
    if run is not None:
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        work = sum(event["cpu_s"] for event in events if event["event"] == "task")
        found |= {"first shard s": round(first or seconds, 2), "start cpu s": round(total - work, 2)}
    return {**found, "processes": {name: round(cpu, 2) for name, cpu in processes.seconds.most_common() if cpu >= 0.1}}


def settings(urls: Path, model: Path, shard_size: int) -> list[str]:
    encoder = f"{{name: t5, kind: t5, model: {model}, max_tokens: 128, compute_dtype: float32}}"
    download = "source.download"
    return [
        *("source.kind=urls", f"source.path={urls}", f"shard_size={shard_size}", "store.dtype=float32"),
        *(f"images.sizes_px={list(SIZES_PX)}", f"encoders=[{encoder}]", f"{download}.allow_private_addresses=true"),
        *(f"{download}.threads={THREADS}", f"{download}.max_per_host={THREADS}"),
    ]


def run_ours(checkout: Path, executor: str, folder: Path, options: list[str], images: int) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    arguments = ["run", "precompute", "--out", str(folder), "--executor", executor, "--quiet"]
    found = measure(pipeline(checkout, *arguments, *options), checkout, folder)
    samples = json.loads((folder / "summary.json").read_text())["num_samples"]
    if samples != images:
        raise SystemExit(f"{samples} of {images} images became samples; see {folder}/quarantine")
    shutil.rmtree(folder)
    return found


def run_peer(script: Path, urls: Path, model: Path, folder: Path, shard_size: int, images: int) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, str(script), str(urls), str(model), str(folder), str(shard_size), str(THREADS)]
    found = measure(command, ROOT, None)
    made = sum(len(np.load(path, mmap_mode="r")) for path in folder.glob("tars/*.64.npy"))
    if made != images:
        raise SystemExit(f"the peer made {made} of {images} images; see {folder}")
    shutil.rmtree(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--shard-size", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--executors", nargs="+", default=["ray", "local"], choices=["ray", "local"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--earlier", default="1ec2329", help="a commit; empty for none")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    work = args.work.resolve()
    model, script = work / "model", work / "peer.py"
    captions = shuffled_prompts()
    write_images(work / f"images-{args.seed}", args.seed)
    if not (model / "tokenizer_config.json").exists():
        model.mkdir(parents=True, exist_ok=True)
        write_model(model, captions)
    script.write_text(PEER)
    checkouts = {"now": ROOT}
    if args.earlier:
        checkouts["earlier"] = work / f"commit-{args.earlier}"
        if not checkouts["earlier"].exists():
            unpack(args.earlier, checkouts["earlier"])
    receive, send = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(work / f"images-{args.seed}", send), daemon=True
    )
    server.start()
    address = f"http://127.0.0.1:{receive.recv()}"
    urls = work / "urls.parquet"
    texts = [captions[i % len(captions)] for i in range(args.images)]
    pq.write_table(pa.table({"url": [f"{address}/{i}.jpg" for i in range(args.images)], "caption": texts}), urls)
    options = settings(urls, model, args.shard_size)
    rounds = Rounds(work / f"rounds-{args.images}-{args.shard_size}-{args.seed}.json")
    try:
        for number in range(1, args.rounds + 1):
            for executor in args.executors:
                for which, checkout in checkouts.items():
                    out = work / "run" / f"{which}-{executor}"
                    rounds.add(
                        f"{which} {executor}",
                        number,
                        lambda c=checkout, e=executor, o=out: run_ours(c, e, o, options, args.images),
                    )
            if not args.no_peer:
                place = work / "run" / "peer"
                rounds.add(
                    "peer", number, lambda at=place: run_peer(script, urls, model, at, args.shard_size, args.images)
                )
    finally:
        server.terminate()
    rows, ratios = summarise(rounds, args.executors)
    notes = [
        f"{args.images} JPEGs of {SIZE[0]} x {SIZE[1]}, shards of {args.shard_size}; medians of {args.rounds} rounds",
        "peer: img2dataset to tars, then Pillow and transformers in batches of 32, in one process",
        "start cpu s: processor time that no task used; processes: the median round's, by what they call themselves",
    ]
    report("job", rows, ratios, args.out, ["ray", "torch", "transformers", "img2dataset", "pillow"], notes)


def summarise(rounds: Rounds, executors: list[str]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    rows: list[dict[str, Any]] = []
    for name, found in rounds.found.items():
        if found:
            middle = sorted(found, key=lambda row: row["seconds"])[len(found) // 2]
            numbers = {
                key: round(statistics.median(row[key] for row in found), 2) for key in found[0] if key[0] != "p"
            }
            rows.append({"what": name, **numbers, "processes": middle["processes"]})  # type: ignore[dict-item]
    ratios: dict[str, float] = {}
    for executor in executors:
        ours = f"now {executor}"
        for other, target in TARGETS.items():
            name = "peer" if other == "peer" else f"{other} {executor}"
            if rounds.found.get(name):
                pairs = zip(rounds.found[name], rounds.found[ours], strict=False)
                ratio = statistics.median(theirs["seconds"] / mine["seconds"] for theirs, mine in pairs)
                ratios[f"seconds: {name} / {ours} (at least {target:g})"] = round(ratio, 2)
        first = rounds.median(ours, "first shard s")
        ratios[f"seconds to the first shard: {ours} (at most {FIRST_SHARD_S[executor]:g})"] = first
    return rows, ratios


if __name__ == "__main__":
    main()
