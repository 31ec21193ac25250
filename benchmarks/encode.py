"""How many captions per second does the encoder reach against the usual ways, and at which part of the matmul rate?

A T5 encoder of t5-v1_1-small's shape with random weights; PartiPrompts in random order. The peers' way of batching is
run with transformers' own model: batches of 32 padded to their longest (imagen-pytorch), or every caption padded to
512 tokens (NeMo, kohya). Rounds are interleaved.

    python -m benchmarks.encode --out benchmarks/results/encode.json
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import report
from benchmarks.store_formats import prompts
from stages.encoders.encoder import TextEncoder, load_encoder
from stages.encoders.t5 import T5EncoderConfig

SHAPE: dict[str, Any] = {
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
SIDE = 2048
BATCH = 32
PAD_TO = 512
Encode = Callable[[Sequence[str]], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which every contestant runs once")
    parser.add_argument("--captions", type=int, help="number of captions, to try the script; default: all")
    arguments = parser.parse_args()
    captions = shuffled_prompts()[: arguments.captions]
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), captions)
        ours = {dtype: load(folder, dtype) for dtype in ("float32", "bfloat16")}
        lengths = [len(e) for e in ours["float32"].encode(captions).embeddings]
        contestants: dict[str, tuple[Encode, Sequence[str]]] = {}
        for dtype, encoder in ours.items():
            few = captions[: 2 * BATCH]
            contestants[f"ours, {dtype}"] = (encoder.encode, captions)
            contestants[f"batches of {BATCH}, {dtype}"] = (fixed_batches(folder, dtype, None), captions)
            contestants[f"padded to {PAD_TO}, {dtype}"] = (fixed_batches(folder, dtype, PAD_TO), few)
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        matmul: dict[str, list[float]] = {dtype: [] for dtype in ours}
        for _ in range(arguments.rounds):
            for dtype in ours:
                matmul[dtype].append(matmul_flops(dtype))
            for name, (encode, texts) in contestants.items():
                began = time.perf_counter()
                encode(texts)
                rates[name].append(len(texts) / (time.perf_counter() - began))
    flops = statistics.fmean(useful_flops(length) for length in lengths)
    best = {dtype: statistics.median(values) for dtype, values in matmul.items()}
    rows: list[dict[str, Any]] = []
    for name, values in rates.items():
        rate = statistics.median(values)
        rows.append(
            {
                "encoder": name,
                "captions_per_s": rate,
                "tokens_per_s": rate * statistics.fmean(lengths),
                "useful_gflop_per_s": rate * flops / 1e9,
                "of_matmul": rate * flops / best[name.rsplit(" ", 1)[1]],
            }
        )
    report(
        "encode",
        rows,
        ratios(rates, {row["encoder"]: row["of_matmul"] for row in rows}),
        arguments.out,
        packages=["imagen-precompute", "torch", "transformers"],
        notes=[
            f"{len(captions)} captions of {statistics.fmean(lengths):.1f} tokens on average, longest {max(lengths)}; "
            "tokenising counts for all",
            f"matmul of {SIDE} x {SIDE}: float32 {best['float32'] / 1e9:,.0f}, bfloat16 {best['bfloat16'] / 1e9:,.0f} "
            "GFLOP/s; useful FLOPs: those of real tokens",
        ],
    )


def ratios(rates: dict[str, list[float]], of_matmul: dict[str, float]) -> dict[str, float]:
    """Medians over the rounds."""

    def over(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(rates[a], rates[b], strict=True))

    pairs = [
        (f"ours, {a}", f"{way}, {b}")
        for a, b in (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"))
        for way in (f"batches of {BATCH}", f"padded to {PAD_TO}")
    ]
    return {
        **{f"captions/s: {a} / {b}": over(a, b) for a, b in pairs},
        **{f"useful FLOPs / matmul: {name}": part for name, part in of_matmul.items() if name.startswith("ours")},
    }


def shuffled_prompts() -> list[str]:
    captions = prompts()
    np.random.default_rng(0).shuffle(captions)
    return captions


def write_model(folder: Path, captions: Sequence[str]) -> None:
    """A model of t5-v1_1-small's shape with random weights, and a tokenizer made of the captions' own words."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    T5EncoderModel(T5Config(**SHAPE)).save_pretrained(folder)
    write_tokenizer(folder, captions)


def write_tokenizer(folder: Path, captions: Sequence[str]) -> None:
    """A unigram tokenizer of 8,000 pieces made of the captions' own words: a stand-in for T5's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=8000, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(facts), encoding="utf-8")


def load(folder: str, dtype: str) -> TextEncoder:
    config = T5EncoderConfig.model_validate({"name": "t5", "model": folder, "compute_dtype": dtype, "num_gpus": 0})
    return load_encoder(config, torch.get_num_threads())


def fixed_batches(folder: str, dtype: str, pad_to: int | None) -> Encode:
    """transformers' model on batches in input order, padded to their longest or to `pad_to`; padding removed."""
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = T5EncoderModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    padding: dict[str, Any] = (
        {"padding": "longest"} if pad_to is None else {"padding": "max_length", "max_length": pad_to}
    )

    @torch.inference_mode()
    def encode(captions: Sequence[str]) -> list[np.ndarray]:
        embeddings: list[np.ndarray] = []
        for start in range(0, len(captions), BATCH):
            batch = tokenizer(captions[start : start + BATCH], return_tensors="pt", truncation=True, **padding)
            hidden = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state.float()
            embeddings += [row[mask.bool()].numpy() for row, mask in zip(hidden, batch.attention_mask, strict=True)]
        return embeddings

    return encode


def matmul_flops(dtype: str, repeats: int = 5) -> float:
    """FLOP/s of a large square product."""
    a = torch.randn(SIDE, SIDE).to(getattr(torch, dtype))
    a @ a
    times: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * SIDE**3 / min(times)


def useful_flops(length: int, shape: dict[str, Any] = SHAPE) -> float:
    """Multiply-adds, counted as two, of a caption without padding: the linear layers and attention's two products."""
    inner = shape["num_heads"] * shape["d_kv"]
    weights = 4 * shape["d_model"] * inner + 3 * shape["d_model"] * shape["d_ff"]
    return 2.0 * shape["num_layers"] * (weights * length + 2 * length**2 * inner)


if __name__ == "__main__":
    main()
