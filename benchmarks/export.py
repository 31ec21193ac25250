"""How fast is a store exported, against copying the exported files?

    python -m benchmarks.export --out benchmarks/results/export.json

One process exports a store with Gaussian float16 embeddings (tokens, 4096) and JPEG images of 256 px, raw ones that
become PNG, or none; in the same round the files of the export are copied.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import report
from benchmarks.store_formats import Captions, write_store
from imagen_core.store.codec import encode
from pipeline.config import load_config
from pipeline.options import RunOptions
from pipeline.storage.files import file_digest
from stages.exports.config import ExportConfig
from stages.sources.synthetic.scenes import render, scene
from workflows.export import Export

SIZE_PX = 256
TARGETS = ("parquet", "webdataset", "mds")
NOTES = [
    "one process, files in memory; rates are MiB of exported files per second of CPU time",
    "checked copy: also computes the sha256 of each file that it reads and of each that it writes, as an export does",
    f"images: drawn scenes of {SIZE_PX} px; jpeg: stored as JPEG and exported unchanged; raw: encoded as PNG",
    "PNG alone / export, time: CPU time of encoding the images, of that of the export",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/export.json")
    parser.add_argument("--dir", type=Path, default="/dev/shm", help="where to put the temporary files")
    parser.add_argument("--captions", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--mean-tokens", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    data = Captions.make(args.captions, args.dim, args.mean_tokens)
    drawn = np.stack([render(scene(0, index), SIZE_PX) for index in range(64)])
    images = {SIZE_PX: drawn[np.arange(args.captions) % len(drawn)]}
    results: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        for codec in ("jpeg", "raw"):
            write_store(Path(folder) / codec, data, images, "hdf5", codec)
        for kind, targets in {"jpeg": TARGETS, "no": TARGETS, "raw": TARGETS[:1]}.items():
            store = f"store={Path(folder) / ('raw' if kind == 'raw' else 'jpeg')}"
            settings = [store, *(["sizes_px=[]"] if kind == "no" else [])]
            for target in targets:
                row = measure([*settings, f"to={target}"], Path(folder), args.rounds)
                results.append({"images": kind, "target": target, "samples": args.captions, **row})
                ratios[f"{target}, {kind} images: export / copy, rate"] = row["to_copy"]
                ratios[f"{target}, {kind} images: export / checked copy, rate"] = row["to_checked_copy"]
    exported_s = results[-1]["mib"] / results[-1]["exported_mib_per_s"]
    png_s = cpu_s(lambda: [encode(image, "png") for image in images[SIZE_PX]])
    ratios["parquet, raw images: PNG alone / export, time"] = png_s / exported_s
    packages = ["imagen-precompute", "pyarrow", "numpy"]
    report("export", results, ratios, args.out, packages, NOTES)


def measure(settings: list[str], folder: Path, rounds: int) -> dict[str, Any]:
    """CPU seconds of exports and of copies in turn, after one of each that does not count."""
    places = {name: folder / name for name in ("exported", "copied", "checked")}
    seconds: dict[str, list[float]] = {name: [] for name in places}
    data = places["exported"] / "data"
    num_bytes = 0
    for _ in range(rounds + 1):
        for place in places.values():
            shutil.rmtree(place, ignore_errors=True)
        seconds["exported"].append(cpu_s(lambda: export(settings, places["exported"])))
        num_bytes = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
        seconds["copied"].append(cpu_s(lambda: copy(data, places["copied"])))
        seconds["checked"].append(cpu_s(lambda: copy(data, places["checked"], checked=True)))
    mib = num_bytes / 2**20
    counted = {name: values[1:] for name, values in seconds.items()}
    return {
        "mib": mib,
        **{f"{name}_mib_per_s": mib / statistics.median(values) for name, values in counted.items()},
        "to_copy": ratio(counted["copied"], counted["exported"]),
        "to_checked_copy": ratio(counted["checked"], counted["exported"]),
    }


def ratio(copies: list[float], exports: list[float]) -> float:
    """Rate of exports divided by that of copies, the median of the rounds."""
    return statistics.median(copied / exported for copied, exported in zip(copies, exports, strict=True))


def cpu_s(fn: Callable[[], object]) -> float:
    began = time.process_time()
    fn()
    return time.process_time() - began


def export(settings: list[str], out: Path) -> None:
    workflow = Export(load_config(ExportConfig, None, settings))
    workflow.run(str(out), RunOptions("inline", quiet=True))


def copy(source: Path, target: Path, *, checked: bool = False) -> None:
    """Copies all files of a folder; `checked`: with the sha256 of what is read, and of what was written."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            to = target / path.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            if checked:
                file_digest(path)
            shutil.copyfile(path, to)
            if checked:
                file_digest(to)


if __name__ == "__main__":
    main()
