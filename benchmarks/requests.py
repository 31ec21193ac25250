"""How many requests and bytes does a run cost whose source and run folder are on S3? Now, and at an earlier commit.

A real S3 server (moto) on this machine counts what reaches it, by kind. Runs of few and of more shards tell what a
shard costs from what a command costs at all. Each command is a process of its own, first of this checkout, then of the
earlier commit, which is unpacked into the work folder.

    python -m benchmarks.requests --earlier 1ec2329 --work evidence-run/requests --out benchmarks/results/requests.json
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import report
from benchmarks.earlier import ROOT, unpack
from tests.object_store import BUCKET, ObjectStore, object_store

ROWS_PER_SHARD = 4
GROUPS = ("samples", "images-16", "images-32", "text-t5")
SETTINGS = ("images.sizes_px=[16,32]", "store.format=hdf5")
TARGETS = {"first run": 12.0, "idle restart": 0.1 * len(GROUPS)}
"""Requests per shard; a restart has 0.1 per record."""


@dataclass(frozen=True)
class Cost:
    """What a command made of requests."""

    kinds: Counter[str]
    source_bytes: int

    @property
    def requests(self) -> int:
        return self.kinds.total()


def write_tars(s3: ObjectStore, folder: str, shards: int, image_px: int, seed: int) -> int:
    """Two tars of incompressible images with captions; returns their bytes."""
    from pipeline.storage.open import open_storage

    dice, total = np.random.default_rng(seed), 0
    for tar in range(2):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            for row in range(shards * ROWS_PER_SHARD // 2):
                png = io.BytesIO()
                Image.fromarray(dice.integers(0, 256, (image_px, image_px, 3), np.uint8)).save(png, "PNG")
                for suffix, content in {"png": png.getvalue(), "txt": b"image %d of %d" % (row, tar)}.items():
                    info = tarfile.TarInfo(f"{row:05d}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        open_storage(f"{s3.url}/{folder}").write(f"{tar:05d}.tar", file.getvalue())
        total += len(file.getvalue())
    return total


def command(s3: ObjectStore, checkout: Path, data: str, *arguments: str) -> Cost:
    """Runs a command of a checkout; what it costs.

    Raises:
        SystemExit: it failed.
    """
    s3.requests.clear()
    environment = {**os.environ, **s3.environment, "PYTHONPATH": str(checkout)}
    module = "pipeline" if (checkout / "pipeline/__main__.py").exists() else "pipeline.cli"
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"pipeline {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return Cost(s3.requests.by_kind(), s3.requests.bytes_sent(f"{data}/"))


def commands(s3: ObjectStore, checkout: Path, data: str, name: str) -> dict[str, Cost]:
    """The life of a run folder: planned, made, started again with nothing to do, looked at."""
    out = f"{s3.url}/{name}"
    what = ("precompute", "--out", out, "source.kind=webdataset", f"source.path={s3.url}/{data}")
    what += (f"shard_size={ROWS_PER_SHARD}", *SETTINGS)
    quiet = ("--executor", "inline", "--quiet")
    return {
        "plan": command(s3, checkout, data, "plan", *what),
        "first run": command(s3, checkout, data, "run", *what, *quiet),
        "idle restart": command(s3, checkout, data, "run", *what, *quiet),
        "status": command(s3, checkout, data, "status", out),
    }


def measure(s3: ObjectStore, checkout: Path, which: str, counts: tuple[int, int], args: Any) -> list[dict[str, Any]]:
    """One row per command: requests of the larger run, per shard, and at all; bytes of the source."""
    found: list[dict[str, Cost]] = []
    total = 0
    for shards in counts:
        data = f"data-{shards}"
        total = write_tars(s3, data, shards, args.image_px, args.seed)
        found.append(commands(s3, checkout, data, f"{which}-{shards}"))
        print(f"{which}: {shards} shards: " + ", ".join(f"{n} {c.requests}" for n, c in found[-1].items()), flush=True)
    rows = []
    for name, many in found[1].items():
        few = found[0][name]
        per_shard = (many.requests - few.requests) / (counts[1] - counts[0])
        rows.append(
            {
                "commit": which,
                "command": name,
                "shards": counts[1],
                "requests": many.requests,
                "per shard": round(per_shard, 3),
                "at all": round(many.requests - counts[1] * per_shard, 1),
                **{f"{kind}s": many.kinds[kind] for kind in ("GET", "HEAD", "PUT", "LIST", "DELETE", "POST")},
                "source bytes, x": round(many.source_bytes / total, 3),
            }
        )
    return rows


def status_of_many(s3: ObjectStore, shards: int, which: str, checkout: Path) -> dict[str, Any]:
    """`status` of a finished run of many shards, each of one generated sample."""
    out = f"{s3.url}/{which}-status"
    settings = (f"source.num_samples={shards}", "shard_size=1", "images.sizes_px=[8,16]")
    command(s3, checkout, "none", "run", "precompute", "--out", out, "--executor", "inline", "--quiet", *settings)
    cost = command(s3, checkout, "none", "status", out)
    print(f"{which}: status of {shards} shards: {cost.requests}", flush=True)
    return {"commit": which, "command": "status of many", "shards": shards, "requests": cost.requests}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--few", type=int, default=10, help="shards of the smaller run")
    parser.add_argument("--many", type=int, default=40, help="shards of the larger run")
    parser.add_argument("--status-shards", type=int, default=1000, help="shards of the run that `status` is asked of")
    parser.add_argument("--image-px", type=int, default=90, help="side of the source's images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--earlier", help="an earlier commit, to count with its code too")
    parser.add_argument("--work", type=Path, required=True, help="folder for the earlier checkout and partial results")
    parser.add_argument("--out", type=Path, help="JSON report")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    checkouts = {"now": ROOT}
    if args.earlier:
        checkouts[args.earlier] = args.work.absolute() / f"checkout-{args.earlier}"
        if not checkouts[args.earlier].exists():
            unpack(args.earlier, checkouts[args.earlier])
    rows: list[dict[str, Any]] = []
    with object_store() as s3:
        assert s3.url.endswith(BUCKET)
        for which, checkout in checkouts.items():
            rows += measure(s3, checkout, which, (args.few, args.many), args)
            if args.status_shards and (which == "now" or args.status_shards <= args.many):
                rows.append(status_of_many(s3, args.status_shards, which, checkout))
            (args.work / "rows.json").write_text(json.dumps(rows, indent=2))
    now = {row["command"]: row for row in rows if row["commit"] == "now"}
    ratios = {
        f"{name}, requests per shard: found / allowed": now[name]["per shard"] / most for name, most in TARGETS.items()
    }
    for row in rows:
        if row["commit"] != "now" and row["command"] in now:
            more = row["requests"] / now[row["command"]]["requests"]
            ratios[f"{row['command']}, requests: {row['commit']} / now"] = more
    notes = [
        "per shard: difference of the larger and the smaller run, per shard; at all: what is left of the larger one",
        "source bytes, x: bytes of the tars that were sent, by bytes of the tars",
        "the source and the run folder are on S3; 2 sizes, a text encoder, no drops",
    ]
    report(
        "requests", rows, {name: round(value, 3) for name, value in ratios.items()}, args.out, ["s3fs", "moto"], notes
    )


if __name__ == "__main__":
    main()
