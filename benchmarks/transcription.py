"""Does a model write what it is told to? Trains it with and without transcriptions and reads held-out words back.

Every step is a `pipeline` command, printed as it runs: precompute draws images of one or two letters, train makes
two 16 px models that read the caption (which names the colours) and differ only in that one reads the transcription
too, sample draws words that were kept out of training. The letters are then read in pixels, by the most similar of 26
templates at each place (benchmarks/word_score.py).

    python -m benchmarks.transcription --work /tmp/words --out benchmarks/results/transcription.json
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cascade import last_metrics, option, pipeline, working_seconds
from benchmarks.common import report
from benchmarks.word_score import CHANCE, color_right, letters_right
from imagen_core.images import read_image, tile, write_png
from stages.sources.synthetic.words import WordScene, word_scene

HELD_OUT_SEED = 7
SIZE_PX = 16
MODELS = {"with transcriptions": [], "without": ["denoiser.unet.transcription=null"]}


def score(images: list[np.ndarray], scenes: list[WordScene]) -> dict[str, float]:
    """Parts in [0, 1]: of the letters, of the words with every place right, of the colours."""
    places = [letters_right(image, scene.word) for image, scene in zip(images, scenes, strict=True)]
    letters = [right for row, scene in zip(places, scenes, strict=True) for right in row[: len(scene.word)]]
    colors = [color_right(image, scene) for image, scene in zip(images, scenes, strict=True)]
    return {
        "letters": float(np.mean(letters)),
        "words": float(np.mean([all(row) for row in places])),
        "colors": float(np.mean(colors)),
    }


def draw(work: Path, name: str, scenes: list[WordScene], guidance: float, *, told: bool) -> list[np.ndarray]:
    """Images of the scenes, drawn by the model in `work/name`."""
    out = work / f"{name}-guidance-{guidance:g}"
    shutil.rmtree(out, ignore_errors=True)
    prompts = out.with_suffix(".txt")
    lines = [scene.captions[0] + (f"\t{scene.word}" if told else "") for scene in scenes]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    pipeline(
        *("run", "sample", "-c", "demo-words", "--out", str(out), "prompts=[]", "transcriptions=[]"),
        *(f"prompts_file={prompts}", f"stages.0.checkpoint={work / name}"),
        f"stages.0.sampling.guidance.transcription={guidance}",
    )
    return [read_image(out / f"images-{SIZE_PX}" / f"{index:05d}.png") for index in range(len(scenes))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for store, checkpoints and images")
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--grid", type=Path, help="PNG of some images")
    parser.add_argument("--words", type=int, default=240, help="held-out images to draw")
    parser.add_argument("--samples", type=int, help="images to train on, instead of the configuration's")
    parser.add_argument("--steps", type=int, help="steps of each model, instead of the configuration's")
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)

    samples, steps = option("source.num_samples", arguments.samples), option("num_steps", arguments.steps)
    pipeline("run", "precompute", "-c", "demo-words", "--executor", "local", "--out", str(work), "--quiet", *samples)
    scenes = [word_scene(HELD_OUT_SEED, index, "held_out") for index in range(arguments.words)]
    rows: list[dict[str, Any]] = []
    for model, changes in MODELS.items():
        name = model.split(maxsplit=1)[0]
        pipeline(
            "run", "train", "-c", "demo-words", "--out", str(work / name), f"store={work}/store", *changes, *steps
        )
        last = last_metrics(work / name)
        training = {
            "steps": last["step"],
            "loss": last["loss"],
            "minutes": round(working_seconds(work / name) / 60, 2),
        }
        told = not changes
        for guidance in (1.0, 2.0) if told else (1.0,):
            images = draw(work, name, scenes, guidance, told=told)
            rows.append(
                {"model": model, "guidance": guidance, "images": len(scenes), **score(images, scenes), **training}
            )
            if told and arguments.grid is not None:
                write_png(arguments.grid, tile(images[:48], columns=12))
    told, without = rows[-2], rows[-1]
    report(
        "transcription",
        rows,
        {"letters, with transcriptions / without, or guessed": told["letters"] / max(without["letters"], CHANCE)},
        arguments.out,
        packages=["imagen-precompute", "torch"],
        notes=[
            f"letters: part of the letters that are read right at their place; guessing gets {CHANCE:.3f}",
            "words: part of the images with every place right, also those that should be empty",
            "colors: part of the words in the colour that the caption names; guessing gets 0.125",
            f"no word of the {len({s.word for s in scenes})} drawn occurs in training",
        ],
    )


if __name__ == "__main__":
    main()
