"""Does a trained cascade show what captions say? Trains the demo's two stages and scores held-out captions.

Every step is a `pipeline` command, printed as it runs: precompute paints and downloads captioned scenes, train makes a
16 px base and a 16 -> 64 px super-resolution model, sample generates images for captions held out of training. The
images are then read back: colour, shape and position of the object are measured in pixels (benchmarks/scene_score.py)
and compared with the caption; and, as a control, with the caption of another image.

    python -m benchmarks.cascade --work /tmp/cascade --out benchmarks/results/cascade.json --grid docs/cascade.png

With --trained it scores the two trainings that are there (`make demo` ends with it).

With --buckets the store keeps the shapes of the scenes (of 20 scenes 14 are square, 3 wide and 3 tall), the base has
32 px, and images are generated 3:2 and 2:3 in turn; objects are read in the centre square, where the scenes have them.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import report
from benchmarks.scene_score import Score, score_single
from imagen_core.images import tile, write_png
from stages.images import read_image
from stages.images.resample import center_square
from stages.sources.synthetic.scenes import Scene, is_held_out, scene

HELD_OUT_SEED = 7
BUCKETS = {
    "precompute": ["images.sizes_px=[32,64]", "images.aspect=buckets"],
    "base": [
        "denoiser.size_px=32",
        "denoiser.unet.image_size_px=32",
        "denoiser.unet.channel_mult=[1,3,3]",
        "denoiser.unet.num_res_blocks=[1,1,2]",
        "denoiser.unet.attention_levels=[false,true,true]",
    ],
    "sr": ["denoiser.low_res_px=32"],
}
"""What differs from the demo's configurations with aspect-ratio buckets."""
ASPECTS = ("3:2", "2:3")
PARTS = ("color", "shape", "position")


def held_out_scenes(count: int) -> list[Scene]:
    """Single-object scenes whose arrangement never occurs in training."""
    found: list[Scene] = []
    index = 0
    while len(found) < count:
        candidate = scene(HELD_OUT_SEED, index, "held_out")
        index += 1
        if len(candidate.objects) == 1:
            assert is_held_out(candidate)
            found.append(candidate)
    return found


def score(images: list[np.ndarray], scenes: list[Scene]) -> dict[str, float]:
    """Part of the images that show what their caption says, in [0, 1]."""
    scores: list[Score] = [score_single(p, s) for p, s in zip(images, scenes, strict=True)]
    return {
        "color": float(np.mean([s.color_ok for s in scores])),
        "shape": float(np.mean([s.shape_ok for s in scores])),
        "position": float(np.mean([s.position_ok for s in scores])),
    }


def pipeline(*arguments: str) -> float:
    """Runs a command; the seconds it took."""
    print("$ pipeline " + " ".join(arguments), flush=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pipeline", *arguments], check=True)
    return time.perf_counter() - began


def working_seconds(run: Path) -> float:
    """Seconds spent on a run folder, over all starts of its command."""
    total = 0.0
    for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        total += {"run_started": -1, "run_ended": 1}.get(event["event"], 0) * event["time"]
    return total


def option(name: str, value: int | None) -> list[str]:
    """The override of a setting as a list of arguments; empty if the value is None."""
    return [] if value is None else [f"{name}={value}"]


def last_metrics(run: Path) -> dict[str, Any]:
    """The last line of a training's metrics that has a loss."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for store, checkpoints and images")
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--grid", type=Path, help="PNG of some images")
    parser.add_argument("--captions", type=int, default=240, help="number of held-out captions")
    parser.add_argument("--samples", type=int, help="scenes to train on, instead of the demo's")
    parser.add_argument("--base-steps", type=int, help="steps of the base, instead of the demo's")
    parser.add_argument("--sr-steps", type=int, help="steps of the super-resolution model, instead of the demo's")
    parser.add_argument("--buckets", action="store_true", help="aspect-ratio buckets instead of squares")
    parser.add_argument("--trained", action="store_true", help="score the trainings in --work, and train nothing")
    arguments = parser.parse_args()
    work: Path = arguments.work
    changes = BUCKETS if arguments.buckets else {stage: [] for stage in BUCKETS}
    work.mkdir(parents=True, exist_ok=True)

    steps = {"base": option("num_steps", arguments.base_steps), "sr": option("num_steps", arguments.sr_steps)}
    if not arguments.trained:
        samples = option("source.num_samples", arguments.samples)
        local = ("--executor", "local", "--out", str(work), "--quiet")
        pipeline("run", "precompute", "-c", "demo", *local, *samples, *changes["precompute"])
        for name, extra in steps.items():
            out, store = str(work / name), f"store={work}/store"
            pipeline("run", "train", "-c", f"demo-{name}", "--out", out, store, *changes[name], *extra)
    seconds = {"precompute": working_seconds(work), **{name: working_seconds(work / name) for name in steps}}

    scenes = held_out_scenes(arguments.captions)
    prompts = work / "prompts.txt"
    prompts.write_text("\n".join(s.captions[0] for s in scenes) + "\n", encoding="utf-8")
    aspects = [ASPECTS[index % 2] for index in range(len(scenes))] if arguments.buckets else []
    shutil.rmtree(work / "held-out", ignore_errors=True)
    seconds["sample"] = pipeline(
        "run",
        "sample",
        "-c",
        "demo",
        "--out",
        str(work / "held-out"),
        "--quiet",
        "prompts=[]",
        f"prompts_file={prompts}",
        f"stages.0.checkpoint={work}/base",
        f"stages.1.checkpoint={work}/sr",
        *([f"aspect=[{','.join(aspects)}]"] if aspects else []),
    )

    rows: list[dict[str, Any]] = []
    for size in (32 if arguments.buckets else 16, 64):
        folder = work / "held-out" / f"images-{size}"
        whole = [read_image(folder / f"{index:05d}.png") for index in range(len(scenes))]
        shapes = sorted({f"{image.shape[0]} x {image.shape[1]}" for image in whole})
        print(f"images of {size} px: {', '.join(shapes)}")
        images = [center_square(image) for image in whole]
        for against, told in (("its own", scenes), ("of another image", scenes[1:] + scenes[:1])):
            rows.append({"size_px": size, "caption": against, "captions": len(scenes), **score(images, told)})
        if size == 64 and arguments.grid is not None:
            write_png(arguments.grid, tile(whole[:48], columns=12))
    for name in steps:
        last = last_metrics(work / name)
        rows.append(
            {
                "training": name,
                "steps": last["step"],
                "loss": last["loss"],
                "minutes": round(seconds[name] / 60, 2),
                "images_per_s": last["images_per_s"],
                "loader_wait": last["loader_wait"],
            }
        )
    own, other = rows[2], rows[3]
    report(
        "cascade_buckets" if arguments.buckets else "cascade",
        rows,
        {f"{part} at 64 px, own caption / caption of another": own[part] / max(other[part], 1e-9) for part in PARTS},
        arguments.out,
        packages=["imagen-precompute", "torch"],
        notes=[
            *(["images are 3:2 and 2:3 in turn, scored in their centre square"] if arguments.buckets else []),
            "color, shape, position: part of the images whose object has the one the caption names",
            f"training both stages took {(seconds['base'] + seconds['sr']) / 60:.1f} minutes; precompute "
            f"{seconds['precompute']:.0f} s, sampling {seconds['sample']:.0f} s",
        ],
    )


if __name__ == "__main__":
    main()
