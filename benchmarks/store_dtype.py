"""What does a smaller type of the stored embeddings cost: bytes, error, and the loss of a training?

The demo's scenes and its base model, once for each `store.dtype`, with the same seed; and a second seed in float32, to
see how much of a difference is chance. A model with random weights has no outlier channels, as T5-XXL has; so the
errors are also given for embeddings of which one channel in a hundred is 30 times as large.

    python -m benchmarks.store_dtype --work /tmp/store-dtype --out benchmarks/results/store_dtype.json
"""

import argparse
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks.cascade import pipeline
from benchmarks.common import report
from imagen_core.store import Store, StoreDtype, cast_embedding, restore

EXACT: StoreDtype = "float32"
CAPTIONS, TOKENS, DIM = 200, 20, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for stores and checkpoints")
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=800)
    arguments = parser.parse_args()
    work: Path = arguments.work
    rows: list[dict[str, Any]] = []
    dtypes: tuple[StoreDtype, ...] = get_args(StoreDtype)
    for dtype in sorted(dtypes, key=lambda dtype: dtype != EXACT):
        run = work / dtype
        settings = [f"source.num_samples={arguments.samples}", "images.sizes_px=[16]", f"store.dtype={dtype}"]
        pipeline("run", "precompute", "-c", "demo", "--executor", "local", "--quiet", "--out", str(run), *settings)
        for seed in (0, 1) if dtype == EXACT else (0,):
            loss = train(run / "store", work / f"train-{dtype}-{seed}", seed, arguments.steps)
            rows.append({"dtype": dtype, "seed": seed, "validation_loss": loss})
        rows[-1] |= errors(Store.open(work / EXACT / "store"), Store.open(run / "store"))
        rows[-1] |= {f"outliers_{name}": value for name, value in errors_with_outliers(dtype).items()}
    exact = rows[0]["validation_loss"]
    half = next(row["text_bytes"] for row in rows if row["dtype"] == "float16")
    report(
        "store_dtype",
        rows,
        {
            "validation loss: another seed / float32": rows[1]["validation_loss"] / exact,
            **{f"validation loss: {r['dtype']} / float32": r["validation_loss"] / exact for r in rows[2:]},
            **{f"bytes of text: {r['dtype']} / float16": r["text_bytes"] / half for r in rows[1:]},
        },
        arguments.out,
        packages=["imagen-precompute", "torch"],
        notes=[
            f"{arguments.samples} scenes, base model of the demo, {arguments.steps} steps of 32, loss on 128 samples "
            "kept out",
            "error: norm of the difference over the norm, of a token; cosine: of a token; with the worst one",
            f"outliers: Gaussian tokens of {DIM}, one channel in a hundred 30 times as large",
        ],
    )


def train(store: Path, out: Path, seed: int, steps: int) -> float:
    """Loss on the samples kept out, at the end."""
    settings = [f"store={store}", f"seed={seed}", f"num_steps={steps}", f"validation.every_steps={steps}"]
    pipeline("run", "train", "-c", "demo-base", "--out", str(out), "--quiet", *settings)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["validation_loss"] for line in map(json.loads, lines) if "validation_loss" in line][-1]


def errors(exact: Store, stored: Store) -> dict[str, float]:
    """Errors over all tokens of the first samples, with the bytes of the text group."""
    [name] = stored.encoders
    pairs = [(exact[i].text[name][0], stored[i].text[name][0]) for i in range(500)]
    group = stored.text_group(name).name
    size = sum(shard.files[group].bytes for shard in stored.manifest.shards())
    return {"text_bytes": size, **compare(*(np.concatenate(part) for part in zip(*pairs, strict=True)))}


def errors_with_outliers(dtype: StoreDtype) -> dict[str, float]:
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((CAPTIONS * TOKENS, DIM), np.float32)
    tokens[:, rng.permutation(DIM)[: DIM // 100]] *= 30
    return compare(tokens, restore(cast_embedding(tokens, dtype), dtype))


def compare(exact: np.ndarray, stored: np.ndarray) -> dict[str, float]:
    exact, stored = exact.astype(np.float64), stored.astype(np.float64)
    norm = np.linalg.norm(exact, axis=1)
    error = np.linalg.norm(exact - stored, axis=1) / norm
    cosine = (exact * stored).sum(axis=1) / (norm * np.linalg.norm(stored, axis=1))
    return {
        "mean_error": float(error.mean()),
        "max_error": float(error.max()),
        "mean_cosine": float(cosine.mean()),
        "min_cosine": float(cosine.min()),
    }


if __name__ == "__main__":
    main()
