"""What do 400 million pairs need? Bytes, files, time, requests, cost, and the driver's memory.

    python -m benchmarks.scale --docs docs/explanation/scale.md

Time and bytes come from `pipeline plan --profile`; requests are counted in a real run on an object store in memory;
the manifest and the URL list are synthetic, of full size or read in part, and measured here.
"""

import argparse
import csv
import hashlib
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import report
from benchmarks.encode import shuffled_prompts
from benchmarks.engine_run import peak_mib
from benchmarks.plan_models import GATED, XXL, configured, write_shape
from benchmarks.scale_requests import requests_a_shard
from benchmarks.table import put_between, shown, table
from pipeline.options import PlanOptions
from pipeline.planning.hardware import load_profile, profiles
from workflows.precompute import Precompute

ROWS, SHARD = 400_000_000, 4000
CLUSTER = {"num_gpus": 64, "num_cpus": 448, "network_gbit_per_s": 400}  # eight machines of 8 GPUs, as the simulation's
USD_PER_TB_OUT = 50.0  # assumption: to the internet, a large account's rate
USD_PER_MILLION = {"PUT": 5.0, "LIST": 5.0, "GET": 0.4, "HEAD": 0.4, "DELETE": 0.0}  # list prices of S3 Standard
PART_BYTES = 50 * 2**20  # s3fs uploads files of more than two such parts in parts
BEGIN, END = "<!-- scale:begin -->", "<!-- scale:end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--docs", type=Path, help="write the tables between the two markers of this file")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        name, number, folder = arguments.part
        print(json.dumps(PARTS[name](int(number), Path(folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        plans = planned(Path(folder))
        rows = [
            *plans,
            *(requests(shards, plans[0]) for shards in (ROWS // SHARD, ROWS // 1000)),
            *(in_process("manifest", shards) for shards in (ROWS // SHARD, ROWS // 1000)),
            *(in_process("source", size) for size in (SHARD, 1000)),
        ]
    report("scale", rows, {}, arguments.out, packages=["imagen-precompute", "pyarrow", "fsspec"])
    if arguments.docs is not None:
        put_between(arguments.docs, BEGIN, END, "\n".join(section(rows)))


def section(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One table for each kind of row."""
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [{key: value for key, value in row.items() if key != "what"} for row in rows if row["what"] == what]
        yield f"**{what}**\n"
        yield from table(list(mine[0]), [[shown(value) for value in row.values()] for row in mine])
        yield ""


# ---- the plan ----


def planned(folder: Path) -> list[dict[str, Any]]:
    """`pipeline plan precompute -c urls-t5-xxl shard_size=4000 --rows 400000000 --profile MINE` for 64 GPUs."""
    captions = shuffled_prompts()
    urls, model = folder / "urls.csv", folder / "model"
    with urls.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["url", "caption"], *([f"https://example.com/{c[:9]}.jpg", c] for c in captions)])
    write_shape(model, {**XXL, **GATED}, captions)
    config = configured(urls, model, "t5").model_copy(update={"shard_size": SHARD})
    rows = []
    for name in ("l4x1", "a100x8", "h200x8"):
        profile = folder / f"{name}.yaml"
        profile.write_text(yaml.safe_dump({**yaml.safe_load(profiles()[name].read_text()), **CLUSTER}))
        plan = dict(Precompute(config).preview(str(folder / "run"), PlanOptions(profile=str(profile), rows=ROWS)))
        rows.append(plan_row(name.rstrip("18").rstrip("x").upper(), plan, load_profile(str(profile)).original_bytes))
    return rows


def plan_row(gpu: str, plan: dict[str, Any], original_bytes: int) -> dict[str, Any]:
    estimate, groups = plan["estimate"], plan["groups"]
    terabytes = {name: group["bytes_to_do"] / 1e12 for name, group in groups.items()}
    total = sum(terabytes.values())
    return {
        "what": "plan",
        "64 GPUs": gpu,
        "hours": estimate["seconds"] / 3600,
        "GPU-hours of encoding": estimate["gpu_hours"],
        "bottleneck": estimate["bottleneck"]["name"],
        "machines, $": estimate["usd_compute"],
        **{f"{name}, TB": value for name, value in terabytes.items()},
        "store, TB": total,
        "store, $ per month": estimate["object_store"]["usd_per_month"],
        "store, $ out once": total * USD_PER_TB_OUT,
        "downloaded, TB": ROWS * original_bytes / 1e12,
    }


# ---- requests to an object store ----


def requests(shards: int, plan: dict[str, Any]) -> dict[str, Any]:
    """Requests per shard, of a run and of the same command again, and what they cost."""
    run, again, driver = requests_a_shard()
    sizes = [value * 1e12 / shards for name, value in plan.items() if name.endswith(", TB") and "-" in name]
    run["PUT"] += sum(1 + -(-size // PART_BYTES) for size in sizes if size > 2 * PART_BYTES)
    return {
        "what": "object store",
        "shards": shards,
        "rows per shard": ROWS // shards,
        **{f"{kind} per shard": run[kind] for kind in USD_PER_MILLION},
        "run, $": shards * cost(run),
        "of them the driver's, per shard": driver,
        "resumed: requests per shard": sum(again.values()),
        "resumed, $": shards * cost(again),
    }


def cost(counts: Mapping[str, float]) -> float:
    return sum(counts[kind] * usd / 1e6 for kind, usd in USD_PER_MILLION.items())


# ---- what the driver carries ----


def in_process(name: str, number: int) -> dict[str, Any]:
    """Runs one of PARTS in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.scale", "--part", name, str(number), folder]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.PIPE)
    return {"what": name, **json.loads(done.stdout.splitlines()[-1])}


def manifest(shards: int, folder: Path) -> dict[str, float]:
    """Writes and loads a manifest of the given number of shards, with four files each."""
    from imagen_core.store import load_manifest, write_manifest

    groups = {f"images-{px}": {"kind": "images", "size_px": px, "format": "hdf5", "codec": "raw"} for px in (1, 2, 3)}
    groups = {"samples": {"kind": "samples"}, **{name: {**group, "config": {}} for name, group in groups.items()}}

    def entries() -> Iterator[dict[str, Any]]:
        for index in range(shards):
            paths = {name: f"{name}/{index:05d}.{'parquet' if name == 'samples' else 'h5'}" for name in groups}
            files = {
                name: {"path": path, "bytes": 10**6, "sha256": f"{index:064x}", "rows": SHARD}
                for name, path in paths.items()
            }
            yield {"index": index, "rows": SHARD, "excluded": {}, "files": files}

    began = time.perf_counter()
    write_manifest(folder / "manifest.json", {"writer": "benchmark", "groups": groups}, entries())
    written, before = time.perf_counter(), peak_mib()
    load_manifest(folder)
    return {
        "shards": shards,
        "files": 4 * shards,
        "MB": (folder / "manifest.json").stat().st_size / 1e6,
        "to write, s": written - began,
        "to load, s": time.perf_counter() - written,
        "memory to load, MiB": peak_mib() - before,
    }


def source(size: int, folder: Path) -> dict[str, float]:
    """Streams shards of a parquet URL list and holds 25 of them, as the window of a run does."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from stages.sources.urls import UrlsConfig

    captions, held = shuffled_prompts(), 25
    rows = held * size
    urls = [f"https://images.example.com/{hashlib.md5(b'%d' % i).hexdigest()}/{i}.jpg" for i in range(rows)]
    texts = [f"{captions[i % len(captions)]} {hashlib.md5(b'%d' % i).hexdigest()[:8]}" for i in range(rows)]
    pq.write_table(pa.table({"url": urls, "caption": texts}), folder / "urls.parquet")
    del urls, texts
    shards = UrlsConfig(path=str(folder / "urls.parquet")).build().shards(size)
    began = time.process_time()
    window = list(shards)
    seconds = time.process_time() - began
    bytes_a_row = sum(len(pickle.dumps(shard)) for shard in window) / rows
    return {
        "rows per shard": size,
        "us per row, to read, digest and pack": seconds / rows * 1e6,
        "all rows, minutes": ROWS * seconds / rows / 60,
        "bytes per row, packed": bytes_a_row,
        "bytes per row, as objects": objects_bytes(window[0].rows) / size,
        "window of 1,024 shards, MiB": 1024 * size * bytes_a_row / 2**20,
    }


def objects_bytes(value: Any) -> int:
    """Bytes of a nested list with all objects in it."""
    return sys.getsizeof(value) + (sum(map(objects_bytes, value)) if isinstance(value, list) else 0)


PARTS = {"manifest": manifest, "source": source}


if __name__ == "__main__":
    main()
