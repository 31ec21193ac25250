"""How well does `pipeline plan --probe` predict a run? Three shapes of work, each planned, run and compared.

    python -m benchmarks.plan --out benchmarks/results/plan.json

Plan and run are separate processes, one after the other; the comparison is the one of `pipeline report`. Targets:
bytes within 2 %, time within 25 %.
"""

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.encode import shuffled_prompts, write_model

EMOJI = Path(__file__).resolve().parents[2] / "shared/data/noto-emoji"
SOURCE_PX = 64  # the images that only carry captions


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--executor", default="ray", choices=("ray", "local", "inline"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="only these shapes, to try the script")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        shapes = {
            "downloads": ["source.num_samples=8000", "shard_size=500", "images.sizes_px=[16,64]"],
            "captions": caption_heavy(Path(folder) / "captions"),
        }
        if EMOJI.is_dir():
            shapes["resizing"] = resize_heavy()
        for round_ in range(arguments.rounds):
            for shape in arguments.only or shapes:
                out = Path(folder) / f"{shape}-{round_}"
                rows += compare(shape, out, arguments.executor, shapes[shape])
    report(
        "plan",
        rows,
        ratios(rows),
        arguments.out,
        packages=["imagen-precompute", "torch", "transformers", "ray", "img2dataset"],
        notes=[
            f"executor {arguments.executor}; planned / actual, median of {arguments.rounds} rounds; "
            "seconds of a stage are those of all its workers, without their start",
            "others: CPUs kept busy by other processes of the machine during the run, near 0 in a fair one; with ray, "
            "its workers count too",
            "downloads: 8,000 synthetic scenes from a loopback server; captions: PartiPrompts with an encoder of "
            "t5-v1_1-small's shape; resizing: 2,000 emoji to 64, 256 and 1024 px",
        ],
    )


def caption_heavy(folder: Path) -> list[str]:
    """PartiPrompts as captions of images of one colour, and an encoder of t5-v1_1-small's shape."""
    from PIL import Image

    captions = shuffled_prompts()
    (folder / "data/images").mkdir(parents=True)
    (folder / "model").mkdir()
    write_model(folder / "model", captions)
    with (folder / "data/captions.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, escapechar=None)
        table.writerow(["file", "caption"])
        for index, caption in enumerate(captions):
            name = f"images/{index:05d}.png"
            color = (index % 256, index // 256, 128)
            Image.new("RGB", (SOURCE_PX, SOURCE_PX), color).save(folder / "data" / name)
            table.writerow([name, caption.replace("\t", " ")])
    model = {"name": "t5", "model": str(folder / "model"), "compute_dtype": "float32"}
    return [
        "source.kind=folder",
        f"source.path={folder / 'data'}",
        "shard_size=100",
        "images.sizes_px=[16]",
        f"encoders={json.dumps([model])}",
    ]


def resize_heavy() -> list[str]:
    return [
        "source.kind=folder",
        f"source.path={EMOJI}",
        "shard_size=100",
        "images.sizes_px=[64,256,1024]",
        "filters=[{kind: too_small, action: upscale}]",
    ]


def compare(shape: str, out: Path, executor: str, overrides: list[str]) -> list[dict[str, Any]]:
    """Plans, runs and reports; one row for each group, each stage and the complete run."""
    common = ["precompute", "--out", str(out), "--executor", executor, "--json", *overrides]
    plan = pipeline("plan", "--probe", "--save", *common)
    began, busy, own = time.perf_counter(), busy_cpu_s(), own_cpu_s()
    pipeline("run", "--quiet", *common)
    others = (busy_cpu_s() - busy - (own_cpu_s() - own)) / (time.perf_counter() - began)
    planned = pipeline("report", str(out), "--json")["planned"]
    rows = [
        {"shape": shape, "what": row.get("group") or row.get("stage"), "unit": unit, **numbers(row), "others": others}
        for unit, part in (("bytes", planned["groups"]), ("seconds", planned["stages"]))
        for row in part
    ]
    print(f"{shape}: {plan['estimate']['basis']}; bottleneck {plan['estimate']['bottleneck']}", file=sys.stderr)
    return rows


def busy_cpu_s() -> float:
    """Seconds all CPUs of the machine have been busy."""
    user, nice, system = (int(word) for word in Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def own_cpu_s() -> float:
    """Of them, for the finished processes that this one started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def numbers(row: dict[str, Any]) -> dict[str, float]:
    return {key: row[key] for key in ("planned", "actual", "ratio")}


def pipeline(*arguments: str) -> dict[str, Any]:
    """The JSON that a command prints."""
    command = [sys.executable, "-m", "pipeline", *arguments]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Planned / actual of all bytes and of the time of each shape, medians over the rounds."""
    result: dict[str, float] = {}
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = [row for row in rows if row["shape"] == shape]
        sizes = [row for row in mine if row["unit"] == "bytes"]
        result[f"bytes: {shape}"] = sum(r["planned"] for r in sizes) / sum(r["actual"] for r in sizes)
        result[f"time: {shape}"] = statistics.median(r["ratio"] for r in mine if r["what"] == "all, overlapping")
    return result


if __name__ == "__main__":
    main()
