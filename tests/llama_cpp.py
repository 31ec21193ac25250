"""A tiny random image-text model as llama.cpp reads it (GGUF), and llama.cpp's server with it.

The server is not part of any package that the tests need: put `llama-server` into PATH, or its path into LLAMA_SERVER.
It can be built from the sources within the package llama-cpp-python (`vendor/llama.cpp`, cmake target `llama-server`).
The package `gguf` writes the model.
"""

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

_WIDTH, _HIDDEN, _HEADS, _LAYERS = 32, 96, 2, 2
_IMAGE_PX, _PATCH_PX = 32, 8
_WORDS = [f"▁{first}{second}" for first in ("la", "mo", "ri", "te", "su") for second in "abcdefghijklmnopqrst"]
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def server_path() -> str | None:
    """The program, if it is there."""
    return os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")


def write_models(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Writes a language model and its image encoder.

    Returns:
        Their files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    language, vision = folder / "tiny.gguf", folder / "tiny-mmproj.gguf"
    _write_language(language, np.random.default_rng(seed))
    _write_vision(vision, np.random.default_rng(seed + 1))
    return language, vision


def _write_language(path: Path, chance: np.random.Generator) -> None:
    gguf: Any = import_module("gguf")
    kind = gguf.TokenType
    control = ["<unk>", "<s>", "</s>"]
    tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *_WORDS]
    kinds = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *[kind.BYTE] * 256, *[kind.NORMAL] * len(_WORDS)]
    file = gguf.GGUFWriter(path, "llama")
    file.add_name("tiny")
    file.add_context_length(512)
    file.add_embedding_length(_WIDTH)
    file.add_block_count(_LAYERS)
    file.add_feed_forward_length(_HIDDEN)
    file.add_head_count(_HEADS)
    file.add_head_count_kv(_HEADS)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_dimension_count(_WIDTH // _HEADS)
    file.add_vocab_size(len(tokens))
    file.add_tokenizer_model("llama")
    file.add_token_list(tokens)
    file.add_token_scores([0.0] * len(control) + [-1.0] * 256 + [-float(i) for i in range(len(_WORDS))])
    file.add_token_types(kinds)
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_chat_template(_TEMPLATE)

    def weights(*shape: int) -> np.ndarray[Any, Any]:
        return chance.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)

    file.add_tensor("token_embd.weight", 6 * weights(len(tokens), _WIDTH))
    head = 4 * weights(len(tokens), _WIDTH)
    head[: -len(_WORDS)] = 0  # words are likelier than bytes, so that the text is valid
    head[2] = 3 * weights(_WIDTH)  # it ends now and then
    file.add_tensor("output.weight", head)
    file.add_tensor("output_norm.weight", np.ones(_WIDTH, np.float32))
    for layer in range(_LAYERS):
        block = f"blk.{layer}"
        file.add_tensor(f"{block}.attn_norm.weight", np.ones(_WIDTH, np.float32))
        file.add_tensor(f"{block}.ffn_norm.weight", np.ones(_WIDTH, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            file.add_tensor(f"{block}.{name}.weight", 2 * weights(_WIDTH, _WIDTH))
        file.add_tensor(f"{block}.ffn_gate.weight", weights(_HIDDEN, _WIDTH))
        file.add_tensor(f"{block}.ffn_up.weight", weights(_HIDDEN, _WIDTH))
        file.add_tensor(f"{block}.ffn_down.weight", weights(_WIDTH, _HIDDEN))
    _finish(file)


def _write_vision(path: Path, chance: np.random.Generator) -> None:
    gguf: Any = import_module("gguf")
    file = gguf.GGUFWriter(path, "clip")
    file.add_bool("clip.has_vision_encoder", True)
    file.add_string("clip.projector_type", "mlp")
    file.add_bool("clip.use_gelu", True)
    for name, value in {
        "image_size": _IMAGE_PX,
        "patch_size": _PATCH_PX,
        "embedding_length": _WIDTH,
        "feed_forward_length": _HIDDEN,
        "projection_dim": _WIDTH,
        "block_count": _LAYERS,
        "attention.head_count": _HEADS,
    }.items():
        file.add_uint32(f"clip.vision.{name}", value)
    file.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    file.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    file.add_array("clip.vision.image_std", [0.25, 0.25, 0.25])

    def add(name: str, *shape: int, scale: float = 1.0) -> None:
        inputs = int(np.prod(shape[1:]))
        file.add_tensor(f"{name}.weight", chance.normal(0, scale * inputs**-0.5, shape).astype(np.float32))

    add("v.patch_embd", _WIDTH, 3, _PATCH_PX, _PATCH_PX, scale=3.0)
    add("v.position_embd", (_IMAGE_PX // _PATCH_PX) ** 2, _WIDTH)
    for layer in range(_LAYERS):
        block = f"v.blk.{layer}"
        for norm in ("ln1", "ln2"):
            file.add_tensor(f"{block}.{norm}.weight", np.ones(_WIDTH, np.float32))
            file.add_tensor(f"{block}.{norm}.bias", np.zeros(_WIDTH, np.float32))
        for name, outputs, inputs in (
            ("attn_q", _WIDTH, _WIDTH),
            ("attn_k", _WIDTH, _WIDTH),
            ("attn_v", _WIDTH, _WIDTH),
            ("attn_out", _WIDTH, _WIDTH),
            ("ffn_up", _HIDDEN, _WIDTH),
            ("ffn_down", _WIDTH, _HIDDEN),
        ):
            add(f"{block}.{name}", outputs, inputs)
            file.add_tensor(f"{block}.{name}.bias", np.zeros(outputs, np.float32))
    for number in (0, 2):
        add(f"mm.{number}", _WIDTH, _WIDTH, scale=3.0)
        file.add_tensor(f"mm.{number}.bias", np.zeros(_WIDTH, np.float32))
    _finish(file)


def _finish(file: Any) -> None:
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@contextmanager
def llama_server(folder: Path, seed: int = 0) -> Iterator[str]:
    """The address of llama.cpp's server with such a model; its output is in `folder/server.log`."""
    program = server_path()
    assert program is not None
    language, vision = write_models(folder, seed)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--ctx-size", "2048", "--parallel", "4", "--threads", "1"]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [program, "--model", str(language), "--mmproj", str(vision), "--alias", "tiny", "--offline", *options],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        ends = time.monotonic() + 60
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < ends, "llama-server does not start"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
