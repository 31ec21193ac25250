"""What does it cost to encode captions in the training loop, instead of reading their embeddings from the store?

The demo's base model on synthetic scenes, trained in turns on cached embeddings and with its text encoder in the loop;
the rate is that of the second half of each training. The encoder has t5-v1_1-small's shape and random weights, unless
`--model` names one; a real run's is up to a hundred times as large.

    python -m benchmarks.online --out benchmarks/results/online.json
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.cascade import pipeline
from benchmarks.common import report
from benchmarks.encode import write_model
from stages.sources.synthetic.scenes import scene


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--rounds", type=int, default=3, help="times each kind is trained")
    parser.add_argument("--steps", type=int, default=60, help="steps of each training")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--model", help="text encoder; hub id or folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = arguments.model or str(work / "t5")
        if arguments.model is None:
            write_model(work / "t5", [scene(0, index).captions[0] for index in range(arguments.samples)])
        encoder = {"name": "t5", "kind": "t5", "model": model, "max_tokens": 128}
        settings = {"encoders": [encoder], "images": {"sizes_px": [16]}, "source": {"num_samples": arguments.samples}}
        (work / "store.yaml").write_text(yaml.safe_dump(settings))
        run = work / "run"
        pipeline("run", "precompute", "-c", str(work / "store.yaml"), "--executor", "local", "--quiet", f"--out={run}")
        dim = json.loads((run / "store/manifest.json").read_text())["groups"]["text-t5"]["dim"]
        common = {"store": str(run / "store"), "denoiser.unet.text_dim": dim, "validation.num_samples": 0}
        common |= {
            "num_steps": arguments.steps,
            "logging.every_steps": arguments.steps // 2,
            "grid.every_steps": "null",
        }
        online = f"online_encoder={json.dumps(encoder)}"
        rows: list[dict[str, Any]] = []
        for number in range(arguments.rounds):
            for kind, more in (("cached", []), ("online", [online])):
                out = work / f"{kind}-{number}"
                overrides = [f"{key}={value}" for key, value in common.items()]
                pipeline("run", "train", "-c", "demo-base", "--quiet", "--out", str(out), *overrides, *more)
                last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
                rows.append({"round": number, "captions": kind} | {k: last[k] for k in ("images_per_s", "loss")})
    pairs = zip(rows[::2], rows[1::2], strict=True)
    report(
        "online",
        rows,
        {"img/s: cached / online": statistics.median(a["images_per_s"] / b["images_per_s"] for a, b in pairs)},
        arguments.out,
        packages=["imagen-precompute", "torch", "transformers"],
        notes=[
            f"demo-base, batches of 32, {arguments.steps} steps, the second half counts; "
            f"encoder {arguments.model or 'of the shape of t5-v1_1-small, random weights'}, {dim} wide"
        ],
    )


if __name__ == "__main__":
    main()
