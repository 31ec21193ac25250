"""What do 100 million captions cost with each encoder? `pipeline plan --profile`, for models that are not installed.

    python -m benchmarks.plan_models --docs docs/how-to/planning.md

Each model folder has the real config.json's numbers, no weights, and a tokenizer made of the captions' own words: a
stand-in, whose counts differ from the real one's. Captions: PartiPrompts. Nothing is timed.
"""

import argparse
import csv
import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from benchmarks.common import report
from benchmarks.encode import shuffled_prompts, write_tokenizer
from benchmarks.table import put_between, shown, table
from pipeline.cli.presets import find_config
from pipeline.config import load_config
from pipeline.options import PlanOptions
from workflows.precompute import Precompute, PrecomputeConfig

ROWS = 100_000_000
BEGIN, END = "<!-- models:begin -->", "<!-- models:end -->"
XXL = {"model_type": "t5", "d_model": 4096, "d_ff": 10240, "num_heads": 64, "d_kv": 64, "num_layers": 24}
GATED = {"feed_forward_proj": "gated-gelu"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "T5 v1.1 XXL": ("t5", {**XXL, **GATED}),
    "T5-11B": ("t5", {**XXL, "d_model": 1024, "d_ff": 65536, "num_heads": 128, "d_kv": 128}),
    "T5 v1.1 large": ("t5", {**XXL, "d_model": 1024, "d_ff": 2816, "num_heads": 16, **GATED}),
    "mT5-XXL": ("t5", {**XXL, "model_type": "mt5", **GATED}),
    "DeBERTa-v2-xxlarge": (
        "auto",
        {
            "model_type": "deberta-v2",
            "hidden_size": 1536,
            "num_hidden_layers": 48,
            "num_attention_heads": 24,
            "intermediate_size": 6144,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
        },
    ),
    "CLIP ViT-L/14, text": (
        "clip",
        {
            "model_type": "clip_text_model",
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--docs", type=Path, help="write the table between the two markers of this file")
    parser.add_argument("--profiles", nargs="+", default=["h200x8", "a100x8"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        captions = shuffled_prompts()
        urls = Path(folder) / "urls.csv"
        with urls.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["url", "caption"])
            writer.writerows([f"https://example.com/{i}.jpg", caption] for i, caption in enumerate(captions))
        rows = []
        for index, (name, (kind, shape)) in enumerate(MODELS.items()):
            model = Path(folder) / str(index)
            write_shape(model, shape, captions)
            config = configured(urls, model, kind)
            rows += [row_of(name, config, profile, planned(urls, config, profile)) for profile in arguments.profiles]
    report("plan_models", rows, {}, arguments.out, packages=["imagen-precompute", "transformers"])
    if arguments.docs is not None:
        fill(arguments.docs, rows)


def write_shape(folder: Path, shape: dict[str, Any], captions: list[str]) -> None:
    """A model folder that can be planned, and not run: its weights are a file without tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    save_file({}, folder / "model.safetensors")
    write_tokenizer(folder, captions)


def configured(urls: Path, model: Path, kind: str) -> PrecomputeConfig:
    overrides = [f"source.path={urls}", f"encoders=[{{name: text, kind: {kind}, model: {model}, max_tokens: 77}}]"]
    return load_config(PrecomputeConfig, find_config("precompute", "urls-t5-xxl"), overrides)


def planned(urls: Path, config: PrecomputeConfig, profile: str) -> dict[str, Any]:
    """What `pipeline plan precompute -c urls-t5-xxl --rows ROWS --profile PROFILE --json` prints."""
    return dict(Precompute(config).preview(str(urls.parent / "run"), PlanOptions(profile=profile, rows=ROWS)))


def row_of(name: str, config: PrecomputeConfig, profile: str, plan: dict[str, Any]) -> dict[str, Any]:
    estimate = plan["estimate"]
    encode = next(stage for stage in estimate["stages"] if stage["stage"] == "encode-text")
    encoder = config.encoders[0]
    with encoder.located() as files:
        dim, weights = encoder.dim(files), encoder.flops(files, [1]) / 2
    return {
        "encoder": name,
        "width": dim,
        "parameters_b": weights / 1e9,
        "tokens_per_caption": encode["tokens"] / ROWS,
        "bytes_per_caption": round(encode["bytes"] / ROWS),
        "gflop_per_caption": encode["flops"] / ROWS / 1e9,
        "text_tb": encode["bytes"] / 1e12,
        "text_usd_per_month": encode["usd_per_month"],
        "machine": profile,
        "gpu_hours": encode["gpu_hours"],
        "encode_alone_h": encode["alone_s"] / 3600,
        "run_h": estimate["seconds"] / 3600,
        "run_usd": estimate["usd_compute"],
        "bottleneck": estimate["bottleneck"]["name"],
    }


def fill(docs: Path, rows: list[dict[str, Any]]) -> None:
    """Puts the table between the markers."""
    titles = {
        "encoder": "encoder",
        "width": "width",
        "parameters_b": "10^9 weights in layers",
        "tokens_per_caption": "tokens per caption",
        "bytes_per_caption": "bytes per caption",
        "gflop_per_caption": "GFLOP per caption",
        "text_tb": "text, TB",
        "text_usd_per_month": "text, $ per month",
        "machine": "machine",
        "gpu_hours": "GPU-hours",
        "run_h": "run, hours",
        "run_usd": "run, $",
        "bottleneck": "bottleneck",
    }
    cells = [[shown(row[key]) for key in titles] for row in rows]
    put_between(docs, BEGIN, END, "\n".join(table(list(titles.values()), cells)) + "\n")


if __name__ == "__main__":
    main()
