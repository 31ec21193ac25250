"""How many captions per second does T5-XXL encode on one GPU in bfloat16, and at which part of the matmul rate?

T5-XXL's encoder (4.76 billion parameters) is built from its configuration with random weights; the captions are
PartiPrompts in random order, repeated many times. Measured: the encoder alone, and all that the encode stage does with
a shard (tokenise, encode, cast, write, sync), three at once as in a worker. The peer is transformers' own model on the
same captions padded to 128 and to 512 tokens.

    python -m benchmarks.encode_gpu --out benchmarks/results/encode_gpu.json
    python -m benchmarks.encode_gpu --tiny       # a small model, to see that the script works; on a CPU too
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.common import matmul_flops, report
from benchmarks.encode import SHAPE, shuffled_prompts, useful_flops, write_tokenizer
from imagen_core.store import cast_embeddings, write_embedding_shard
from stages.encoders.base import TokenModel
from stages.encoders.encoder import TextEncoder
from stages.encoders.model_files import ModelFiles
from stages.encoders.packed.t5 import PackedT5
from stages.encoders.t5 import T5EncoderConfig

XXL: dict[str, Any] = {**SHAPE, "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
SHARD = 1000
PADDED_TO = (128, 512)
BATCH = 64
STAGE = "ours, whole stage, 3 shards at once"


class RandomT5(T5EncoderConfig):
    """A T5 with random weights, made on the device: 9.5 GB that need not be written and read."""

    def build(self, files: ModelFiles, dtype: Any, device: Any) -> TokenModel:
        return PackedT5(random_model(dict(files.config), dtype, device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--dir", type=Path, help="where to write the shards; default: the system's temporary folder")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script anywhere")
    parser.add_argument("--shards", type=int, default=20, help=f"shards of {SHARD} captions")
    parser.add_argument("--tokens-per-batch", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not arguments.tiny:
        print("no CUDA device: nothing measured (--tiny tries the script on a CPU)")
        return
    shape = {**XXL, "d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4} if arguments.tiny else XXL
    if arguments.tiny:
        arguments.shards, arguments.tokens_per_batch = 2, [2048]
    prompts = shuffled_prompts()
    captions = list(itertools.islice(itertools.cycle(prompts), arguments.shards * SHARD))
    shards = [captions[start : start + SHARD] for start in range(0, len(captions), SHARD)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        write_tokenizer(Path(folder), prompts)
        config = RandomT5.model_validate({"name": "t5", "model": folder, "num_gpus": None})
        files = ModelFiles(folder, None, Path(folder), {**shape, "model_type": "t5"}, {})
        rows += measure_ours(TextEncoder(config, files, 2), shards, arguments.tokens_per_batch, Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    model = random_model(shape, torch.bfloat16, torch.device("cuda" if on_gpu else "cpu"))
    few = captions[: BATCH * (2 if arguments.tiny else 32)]
    for length in PADDED_TO:
        encode_padded(model, tokenizer, few[:BATCH], length)  # warm up
        rows.append(
            row(f"padded to {length}", few, lambda length=length: encode_padded(model, tokenizer, few, length))
        )
    lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    flops = statistics.fmean(useful_flops(length, shape) for length in lengths)
    matmul = matmul_flops()
    for entry in rows:
        entry["tokens_per_s"] = entry["captions_per_s"] * statistics.fmean(lengths)
        entry["useful_tflop_per_s"] = entry["captions_per_s"] * flops / 1e12
        entry["of_matmul"] = entry["captions_per_s"] * flops / matmul
    report(
        "encode_gpu",
        rows,
        ratios(rows),
        arguments.out,
        packages=["imagen-precompute", "torch", "transformers"],
        notes=[
            f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}; bfloat16 matmul: {matmul / 1e12:.3g} TFLOP/s",
            f"{statistics.fmean(lengths):.1f} tokens a caption, with a tokenizer made of the captions' own words",
            *(["--tiny: a small model instead of T5-XXL"] if arguments.tiny else []),
        ],
    )


def measure_ours(
    encoder: TextEncoder, shards: list[list[str]], budgets: list[int], folder: Path
) -> list[dict[str, Any]]:
    """The encoder alone with each budget, then the complete stage with the best one."""
    captions = list(itertools.chain(*shards))
    encoder.encode(shards[0])  # warm up
    rows: list[dict[str, Any]] = []
    for budget in budgets:
        encoder.tokens_per_batch = budget
        rows.append(row(f"ours, {budget} tokens a batch", captions, lambda: [encoder.encode(s) for s in shards]))
    encoder.tokens_per_batch = budgets[max(range(len(rows)), key=lambda i: rows[i]["captions_per_s"])]
    return [*rows, row(STAGE, captions, lambda: write(encoder, shards, folder))]


def row(name: str, captions: list[str], work: Callable[[], object]) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    rate = len(captions) / (time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return {"encoder": name, "captions_per_s": rate, "peak_memory_gib": peak}


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    by_name = {row["encoder"]: row for row in rows}
    best = max((row for row in rows if row["encoder"].endswith("a batch")), key=lambda row: row["captions_per_s"])
    padded = {length: by_name[f"padded to {length}"]["captions_per_s"] for length in PADDED_TO}
    return {
        **{f"captions/s: ours / padded to {length}": best["captions_per_s"] / padded[length] for length in PADDED_TO},
        "useful FLOPs / matmul: ours": best["of_matmul"],
        "captions/s: whole stage / model alone": by_name[STAGE]["captions_per_s"] / best["captions_per_s"],
    }


def random_model(shape: dict[str, Any], dtype: Any, device: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = T5EncoderModel(T5Config(**{**shape, "model_type": "t5"}))
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def write(encoder: TextEncoder, shards: list[list[str]], folder: Path) -> None:
    """What the encode stage does with a shard, three at once."""

    def one(index: int) -> None:
        path = folder / f"{index:05d}.h5"
        captions = shards[index]
        embeddings = encoder.encode(captions).embeddings
        cast, num_tokens = cast_embeddings(embeddings, encoder.dim, "float16"), [len(x) for x in embeddings]
        write_embedding_shard(
            path, cast, num_tokens, encoder.dim, "float16", "hdf5", captions=captions, fingerprint={}
        )
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.unlink()

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(one, range(len(shards))))


@torch.inference_mode()
def encode_padded(model: Any, tokenizer: Any, captions: list[str], length: int) -> None:
    """transformers' model on batches padded to a fixed length; embeddings on the CPU."""
    for start in range(0, len(captions), BATCH):
        batch = tokenizer(
            captions[start : start + BATCH],
            return_tensors="pt",
            padding="max_length",
            max_length=length,
            truncation=True,
        ).to(model.device)
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state.cpu()


if __name__ == "__main__":
    main()
