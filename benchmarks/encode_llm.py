"""How many captions per second does a language model as encoder reach against the usual way, and at which part of the
matmul rate?

A model of Gemma 2's layout with 100 million random weights, float32, and the recipe `sana`: an instruction before each
of PartiPrompts' captions, in random order. The peer is transformers' own model on batches of 32, padded to their
longest, the instruction in each caption. Each has a process of its own, whose memory is measured (Linux); rounds are
interleaved. Processor time holds on a machine that others use too.

    python -m benchmarks.encode_llm --out benchmarks/results/encode_llm.json
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import report
from benchmarks.encode import SIDE, shuffled_prompts
from stages.encoders.batches.model_input import common_start
from stages.encoders.recipes.shipped import recipes

SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "query_pre_attn_scalar": 128,
    "vocab_size": 8000,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
RECIPE = "sana"
BATCH = 32
PEER_CAPTIONS = 2 * BATCH
LEAST_RATIO, LEAST_PART = 4.0, 0.65
OURS, PEER = "ours", f"batches of {BATCH}"
Encode = Callable[[Sequence[str]], list[np.ndarray]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which every contestant runs once")
    parser.add_argument("--captions", type=int, help="number of captions, to try the script; default: all")
    arguments = parser.parse_args()
    captions = shuffled_prompts()[: arguments.captions]
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # a contestant that waits takes no processor time from the other
    texts = {OURS: captions, PEER: captions[:PEER_CAPTIONS]}
    rates: dict[str, list[np.ndarray]] = {OURS: [], PEER: []}
    matmul: list[np.ndarray] = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), captions)
        contestants = {name: Contestant(name, folder) for name in rates}
        same = [contestant.encode(captions[:BATCH])[1] for contestant in contestants.values()]
        difference = max(float(np.abs(a - b).max()) for a, b in zip(*same, strict=True))
        shared, lengths = token_counts(folder, captions)
        for _ in range(arguments.rounds):
            before = matmul_rates()
            for name, contestant in contestants.items():
                rates[name].append(len(texts[name]) / contestant.encode(texts[name])[0])
                if name == OURS:
                    matmul.append((before + matmul_rates()) / 2)
        memory = {name: contestant.close() for name, contestant in contestants.items()}
    flops = useful_flops(shared, lengths) / len(captions)
    parts = np.median(np.array(rates[OURS]) * flops / matmul, axis=0)
    times = np.median(np.array(rates[OURS]) / rates[PEER], axis=0)
    rows: list[dict[str, Any]] = [
        {
            "encoder": name,
            "captions_per_s": statistics.median(float(wall) for wall, _ in found),
            "captions_per_cpu_s": statistics.median(float(cpu) for _, cpu in found),
            "useful_gflop_per_s": statistics.median(float(wall) for wall, _ in found) * flops / 1e9,
            "loaded_mib": memory[name][0],
            "peak_mib": memory[name][1],
        }
        for name, found in rates.items()
    ]
    report(
        "encode_llm",
        rows,
        {
            f"captions/s: {OURS} / {PEER} (at least {LEAST_RATIO:g})": float(times[0]),
            f"captions/s of processor time: {OURS} / {PEER}": float(times[1]),
            f"useful FLOPs / matmul: {OURS} (at least {LEAST_PART:g})": float(parts[0]),
            f"useful FLOPs / matmul, by processor time: {OURS}": float(parts[1]),
            f"peak memory above the loaded model: {PEER} / {OURS}": grown(memory[PEER]) / grown(memory[OURS]),
        },
        arguments.out,
        packages=["imagen-precompute", "torch", "transformers"],
        notes=[
            f"{len(captions)} captions of {statistics.fmean(lengths):.1f} tokens on average, longest {max(lengths)}, "
            f"behind {shared} of the instruction; tokenising counts; the peer runs {len(texts[PEER])} of them",
            f"{weights() / 1e6:.0f} million weights in the layers; matmul of {SIDE} x {SIDE}: float32 "
            f"{float(np.median(matmul, axis=0)[0]) / 1e9:,.0f} GFLOP/s",
            "useful FLOPs: the instruction once, the tokens of each caption, and of attention the pairs that may meet",
            f"largest difference between both, in {BATCH} captions: {difference:.1g}",
        ],
    )


def matmul_rates(repeats: int = 10) -> np.ndarray:
    """FLOP per second, and per second of processor time, of a large square product in float32."""
    import torch

    a = torch.randn(SIDE, SIDE)
    a @ a
    began, cpu_began = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        a @ a
    return repeats * 2.0 * SIDE**3 / np.array([time.perf_counter() - began, time.process_time() - cpu_began])


def write_model(folder: Path, captions: Sequence[str]) -> None:
    """The model, and a tokenizer with a token for each word of captions and instruction: a stand-in for Gemma's."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    Gemma2Model(Gemma2Config(**SHAPE)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.WordLevelTrainer(vocab_size=SHAPE["vocab_size"], special_tokens=special, show_progress=False)
    words = [settings()["template"]["prefix"], *(caption.lower() for caption in captions)]
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts), encoding="utf-8")


def settings() -> dict[str, Any]:
    return recipes()[RECIPE]["settings"]


def token_counts(folder: str, captions: Sequence[str]) -> tuple[int, list[int]]:
    """Tokens that all captions begin with, and how many each has behind them."""
    from transformers import AutoTokenizer

    before = settings()["template"]["prefix"]
    texts = [f"{before}{caption.lower().strip()}" for caption in captions]
    whole = AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    shared = len(common_start(whole))
    return shared, [len(ids) - shared for ids in whole]


def weights() -> int:
    """Of the linear layers."""
    queries, keys = (SHAPE[heads] * SHAPE["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
    attention, feed_forward = 2 * queries + 2 * keys, 3 * SHAPE["intermediate_size"]
    return SHAPE["num_hidden_layers"] * SHAPE["hidden_size"] * (attention + feed_forward)


def useful_flops(prefix: int, lengths: Sequence[int]) -> float:
    """Multiply-adds, counted as two: of the linear layers for each token, of attention for the pairs that may meet."""
    tokens = prefix + sum(lengths)
    pairs = prefix * (prefix + 1) / 2 + sum(n * prefix + n * (n + 1) / 2 for n in lengths)
    inner = SHAPE["num_attention_heads"] * SHAPE["head_dim"]
    return 2.0 * weights() * tokens + 4.0 * SHAPE["num_hidden_layers"] * inner * pairs


# ---- the contestants, each in a process of its own ----


class Contestant:
    """A process that has loaded a model and encodes what it is sent."""

    def __init__(self, name: str, folder: str):
        self._connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=serve, args=(name, folder, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._loaded_mib: float = self._connection.recv()

    def encode(self, captions: Sequence[str]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Seconds and seconds of processor time, and the embeddings of the first `BATCH` captions."""
        self._connection.send(list(captions))
        return self._connection.recv()

    def close(self) -> tuple[float, float]:
        """MiB in memory after loading, and most since then."""
        self._connection.send(None)
        peak = self._connection.recv()
        self._process.join()
        return self._loaded_mib, peak


def grown(memory: tuple[float, float]) -> float:
    return memory[1] - memory[0]


def serve(name: str, folder: str, connection: Connection) -> None:
    encode = ours(folder) if name == OURS else batches(folder)
    encode(["a"])  # which reads weights that were only mapped
    connection.send(memory_mib("VmRSS"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    while (captions := connection.recv()) is not None:
        began = np.array([time.perf_counter(), time.process_time()])
        found = encode(captions)
        connection.send((np.array([time.perf_counter(), time.process_time()]) - began, found[:BATCH]))
    connection.send(memory_mib("VmHWM"))


def memory_mib(name: str) -> float:
    """Of this process, on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def ours(folder: str) -> Encode:
    import torch

    from stages.encoders.auto import AutoEncoderConfig
    from stages.encoders.encoder import load_encoder

    own = {"name": "text", "model": folder, "recipe": RECIPE, "compute_dtype": "float32", "num_gpus": 0}
    encoder = load_encoder(AutoEncoderConfig.model_validate({**settings(), **own}), torch.get_num_threads())
    return lambda captions: encoder.encode(captions).embeddings


def batches(folder: str) -> Encode:
    """transformers' model on batches in input order; the rows that the recipe keeps, without padding."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, before = AutoTokenizer.from_pretrained(folder), settings()["template"]["prefix"]
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    last = len(tokenizer(before)["input_ids"]) - 1

    @torch.inference_mode()
    def encode(captions: Sequence[str]) -> list[np.ndarray]:
        embeddings: list[np.ndarray] = []
        for start in range(0, len(captions), BATCH):
            texts = [f"{before}{caption.lower().strip()}" for caption in captions[start : start + BATCH]]
            batch = tokenizer(texts, return_tensors="pt", padding="longest", padding_side="right")
            hidden = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
            for rows, mask in zip(hidden, batch.attention_mask.bool(), strict=True):
                kept = rows[mask]
                embeddings.append(torch.cat([kept[:1], kept[last:]]).numpy())
        return embeddings

    return encode


if __name__ == "__main__":
    main()
