"""Do images from DALL-E 2's path show what captions say? A prior and a decoder against an Imagen base model.

A small CLIP is trained on scenes; precompute caches its embeddings of captions and images next to a T5's; a prior, a
decoder and an Imagen base (16 px, the same UNet, the same number of steps) are trained from the cache alone. On
held-out scenes: how similar the prior's embeddings are to those of the true images, compared with the captions'
embeddings; and what the images of both paths show, measured in pixels as in `benchmarks.cascade`.

    python -m benchmarks.dalle2 --work /tmp/dalle2 --out benchmarks/results/dalle2.json
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from benchmarks.cascade import PARTS, held_out_scenes, pipeline, score, working_seconds
from benchmarks.common import report
from benchmarks.small_clip import DIM, train_small_clip
from imagen_core.images import tile, write_png
from stages.images import read_image

PRESET = Path(__file__).resolve().parents[1] / "workflows/configs/train/demo-base.yaml"


def configs(store: Path, clip: Path, steps: int, prior_steps: int) -> dict[str, dict[str, Any]]:
    """The configurations of the three trainings."""
    base = yaml.safe_load(PRESET.read_text(encoding="utf-8"))
    base |= {"store": str(store), "num_steps": steps, "grid": {"every_steps": None}}
    unet = base["denoiser"]["unet"] | {"text_dim": None, "image_embed_dim": DIM, "attention_type": "fused"}
    decoder = {**base, "text": None, "image_embed": "clip", "denoiser": {**base["denoiser"], "unet": unet}}
    network = {"dim": DIM, "depth": 4, "num_heads": 4, "head_dim": 32, "text_dim": 64, "max_text_tokens": 32}
    prior = {
        **{key: base[key] for key in ("store", "max_tokens")},
        "denoiser": {"kind": "prior", "network": network},
        "text": "clip-tokens",
        "text_embed": "clip",
        "image_embed": "clip",
        "num_steps": prior_steps,
        "batch_size": 128,
        "validation": base["validation"] | {"every_steps": prior_steps},
        "checkpoints": {"keep": base["checkpoints"]["keep"]},
        "optimizer": {"lr": 0.001, "warmup_steps": 100, "schedule": "cosine", "final_lr_fraction": 0.02},
        "ema": {"rates": [0.995]},
        "logging": {"every_steps": 50},
    }
    return {"prior": prior, "decoder": decoder, "imagen": base}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for model, store, checkpoints and images")
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--grid", type=Path, help="PNG of some images: DALL-E 2's path above, Imagen's below")
    parser.add_argument("--captions", type=int, default=240, help="number of held-out captions")
    parser.add_argument("--samples", type=int, default=8000, help="scenes to train on")
    parser.add_argument("--steps", type=int, default=3000, help="steps of decoder and Imagen base")
    parser.add_argument("--prior-steps", type=int, default=1500, help="steps of the prior")
    parser.add_argument("--clip-steps", type=int, default=2400, help="steps of the CLIP")
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    clip = work / "clip"
    if not (work / "clip.json").exists():
        clip.mkdir(exist_ok=True)
        found = {"own_caption_first": train_small_clip(clip, num_steps=arguments.clip_steps)}
        (work / "clip.json").write_text(json.dumps(found), encoding="utf-8")
    texts = [
        {"name": "t5", "kind": "t5", "model": "tiny-random-t5"},
        {"name": "clip", "kind": "clip", "model": str(clip), "output": "projected", "max_tokens": 32},
        {"name": "clip-tokens", "kind": "clip", "model": str(clip), "max_tokens": 32},
    ]
    images = [{"name": "clip", "model": str(clip), "from_px": 64}]
    pipeline(
        *("run", "precompute", "-c", "demo", "--executor", "local", "--out", str(work), "--quiet"),
        f"source.num_samples={arguments.samples}",
        f"encoders={json.dumps(texts)}",
        f"image_encoders={json.dumps(images)}",
    )
    rows: list[dict[str, Any]] = []
    for name, config in configs(work / "store", clip, arguments.steps, arguments.prior_steps).items():
        (work / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        pipeline("run", "train", "-c", str(work / f"{name}.yaml"), "--out", str(work / name))
        minutes = round(working_seconds(work / name) / 60, 2)
        rows.append({"training": name, "steps": config["num_steps"], "minutes": minutes})
    lines = [json.loads(line) for line in (work / "prior/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    similar = [line for line in lines if "baseline" in line][-1]
    names = ("baseline", "with_image_64", "with_text_64", "with_unrelated_text_64", "above_baseline_64")
    rows.append({"similarities of": "128 held-out pairs", **{name: round(similar[name], 4) for name in names}})

    scenes = held_out_scenes(arguments.captions)
    prompts = work / "prompts.txt"
    prompts.write_text("\n".join(s.captions[0] for s in scenes) + "\n", encoding="utf-8")
    prior = {"checkpoint": str(work / "prior"), "encoder_model": str(clip)}
    drawn = {}
    for path, stage, extra in (
        ("dalle2", {"checkpoint": str(work / "decoder"), "sampling": {"guidance": {"image_embed": 2.0}}}, [prior]),
        ("imagen", {"checkpoint": str(work / "imagen"), "sampling": {"guidance": {"text": 3.0}}}, []),
    ):
        out = work / f"images-{path}"
        shutil.rmtree(out, ignore_errors=True)
        more = [f"prior={json.dumps(value)}" for value in extra]
        stages = json.dumps([stage])
        pipeline(
            *("run", "sample", "--out", str(out), f"prompts_file={prompts}", f"stages={stages}", "batch_size=60"),
            *more,
        )
        drawn[path] = [read_image(out / "images-16" / f"{index:05d}.png") for index in range(len(scenes))]
        for against, told in (("its own", scenes), ("of another image", scenes[1:] + scenes[:1])):
            rows.append({"path": path, "caption": against, "captions": len(scenes), **score(drawn[path], told)})
    if arguments.grid is not None:
        write_png(arguments.grid, tile([*drawn["dalle2"][:24], *drawn["imagen"][:24]], columns=12))
    dalle2, imagen = (next(row for row in rows if row.get("path") == path) for path in ("dalle2", "imagen"))
    gap = (1 - similar["with_image_64"]) / (1 - similar["baseline"])
    report(
        "dalle2",
        rows,
        {
            "distance to the true image's embedding: prior's / caption's (1 - cosine)": gap,
            **{f"{part}: dalle2 / imagen": dalle2[part] / max(imagen[part], 1e-9) for part in PARTS},
        },
        arguments.out,
        packages=["imagen-precompute", "torch", "transformers"],
        notes=[
            "color, shape, position: part of the 16 px images whose object has the one the caption names",
            f"CLIP: own caption first in {json.loads((work / 'clip.json').read_text())['own_caption_first']:.1%} of "
            "batches of 128",
        ],
    )


if __name__ == "__main__":
    main()
