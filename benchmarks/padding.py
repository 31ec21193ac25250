"""How many bytes do the embeddings of published recipes take, stored, and padded as their own caches are?

    python -m benchmarks.padding --out benchmarks/results/padding.json

`pipeline plan` of PartiPrompts with models that are not installed: each folder has the real config.json's numbers, no
weights, and a tokenizer made of the captions' own words: a stand-in, whose counts differ from the real one's. Where a
recipe stores rows of padding, because its network reads them, it is planned without them too: a network that is
trained with the mask needs none. Nothing is timed.
"""

import argparse
import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks.common import report
from benchmarks.encode import shuffled_prompts, write_tokenizer
from pipeline.config import load_config
from pipeline.options import PlanOptions
from workflows.precompute import Precompute, PrecomputeConfig

HEADS = {"num_key_value_heads": 8, "head_dim": 128}
QWEN3_4B = {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728}
MISTRAL_24B = {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 32, "intermediate_size": 32768}
LLAMA_8B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336}
QWEN25_7B = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "intermediate_size": 18944}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "d_kv": 64, "num_layers": 24}
PADDED_512 = {"max_tokens": 512, "pads": {"to": 512}}
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "FLUX.2 klein, Qwen3-4B": ({"recipe": "flux2-klein"}, {"model_type": "qwen3", **QWEN3_4B, **HEADS}),
    "FLUX.2 dev, Mistral 24B": (
        {"kind": "auto", "layers": [10, 20, 30], "template": {"chat": {}}, **PADDED_512},
        {"model_type": "mistral", **MISTRAL_24B, **HEADS},
    ),
    "HiDream-I1, Llama 3.1 8B": ({"recipe": "hidream-llama"}, {"model_type": "llama", **LLAMA_8B, **HEADS}),
    "HiDream-I1, T5-XXL": (
        {"recipe": "hidream-t5"},
        {"model_type": "t5", "feed_forward_proj": "gated-gelu", **T5_XXL},
    ),
    "Qwen-Image, Qwen2.5-VL-7B": (
        {"recipe": "qwen-image", "drop_prefix": "auto"},  # 34 rows are those of the real tokenizer
        {"model_type": "qwen2_5_vl", "text_config": {**QWEN25_7B, "num_key_value_heads": 4}},
    ),
}
"""Settings of the encoder, and the numbers of the model's config.json, by what they are of."""
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ["<|im_start|>", "<|im_end|>"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--captions", type=int, help="number of captions, to try the script; default: all")
    arguments = parser.parse_args()
    captions = list(dict.fromkeys(shuffled_prompts()[: arguments.captions]))
    with tempfile.TemporaryDirectory() as folder:
        rows = planned_rows(Path(folder), captions)
    pairs = {(row["recipe"], row["pads"]): row for row in rows}
    ratios = {
        f"bytes: padded / stored in {dtype}: {name}, {pads}": row["padded"] / row[dtype]
        for (name, pads), row in pairs.items()
        for dtype in ("bfloat16", "int8")
    }
    notes = [
        f"{len(captions)} captions of PartiPrompts, and bytes per caption; padded: to the recipe's longest, bfloat16"
    ]
    packages = ["imagen-precompute", "transformers"]
    report("padding", rows, ratios, arguments.out, packages=packages, notes=notes)


def planned_rows(folder: Path, captions: list[str]) -> list[dict[str, Any]]:
    """One row per recipe, and another where it stores padding: without it."""
    urls, rows = folder / "urls.csv", list[dict[str, Any]]()
    with urls.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["url", "caption"])
        writer.writerows([f"https://example.com/{i}.jpg", caption] for i, caption in enumerate(captions))
    for number, (name, (settings, shape)) in enumerate(RECIPES.items()):
        model = folder / str(number)
        write_shape(model, shape, captions)
        encoder = {"name": "text", **settings, "model": str(model)}
        found = [planned(urls, encoder, dtype) for dtype in ("bfloat16", "int8")]
        rows.append(row_of(name, "as the recipe", found, len(captions)))
        without = [planned(urls, {**encoder, "pads": "none"}, dtype) for dtype in ("bfloat16", "int8")]
        if without != found:
            rows.append(row_of(name, "none", without, len(captions)))
    return rows


def write_shape(folder: Path, shape: dict[str, Any], captions: list[str]) -> None:
    """A model folder that can be planned, and not run: it has no weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    save_file({"none": np.zeros(1, np.float32)}, folder / "model.safetensors")
    write_tokenizer(folder, captions)
    if shape["model_type"] != "t5":
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        first = len(tokenizer["model"]["vocab"])
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        marks = [{"id": first + i, "content": mark, "special": True, **flags} for i, mark in enumerate(MARKS)]
        tokenizer["added_tokens"] += marks
        tokenizer["post_processor"] = None
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        facts = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        (folder / "tokenizer_config.json").write_text(json.dumps({**facts, "chat_template": CHAT}), encoding="utf-8")


def planned(urls: Path, encoder: dict[str, Any], dtype: str) -> dict[str, Any]:
    """What `pipeline plan precompute --json` says of the group of the embeddings."""
    overrides = [f"source={{kind: urls, path: {urls}}}", "images.sizes_px=[]", f"store.dtype={dtype}"]
    config = load_config(PrecomputeConfig, None, [*overrides, f"encoders={json.dumps([encoder])}"])
    return dict(Precompute(config).preview(str(urls.parent / "run"), PlanOptions()))["groups"]["text-text"]


def row_of(name: str, pads: str, found: list[dict[str, Any]], count: int) -> dict[str, Any]:
    bfloat16, int8 = found
    (layout, padded), *_ = bfloat16["bytes_otherwise"].items()
    return {
        "recipe": name,
        "pads": pads,
        "bfloat16": round(bfloat16["bytes_to_do"] / count),
        "int8": round(int8["bytes_to_do"] / count),
        "padded": round(padded / count),
        "layout": layout,
    }


if __name__ == "__main__":
    main()
