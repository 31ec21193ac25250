"""The T5 encoder gives what transformers gives caption by caption, whatever the batches."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, T5EncoderModel

from pipeline.errors import ConfigError, MachineError
from stages.encoders.batches.tokens import tokenize
from stages.encoders.encoder import TextEncoder, load_encoder
from stages.encoders.t5 import T5EncoderConfig
from stages.encoders.tiny import TINY_MODEL, write_tiny_model

CAPTIONS = [
    "a red circle above a blue square",
    "",
    "a",
    "one two three four five six seven eight nine ten",
    "A strange caption: 🐈 خط é",
    "a green triangle left of a yellow star, and then some more words that no scene has",
    "a red circle above a blue square!",
    "x" * 40,
]
EOS = 1


def config(model: str = TINY_MODEL, **changes: object) -> T5EncoderConfig:
    return T5EncoderConfig.model_validate(
        {"name": "t5", "model": model, "compute_dtype": "float32", "num_gpus": 0, **changes}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a local folder."""
    path = tmp_path_factory.mktemp("models") / TINY_MODEL
    write_tiny_model(path)
    return path


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return load_encoder(config(), 1)


def with_changes(encoder: TextEncoder, **changes: object) -> TextEncoder:
    """The same weights with other settings, not loaded again."""
    copy, config = object.__new__(TextEncoder), encoder.config.model_copy(update=changes)
    copy.__dict__.update(encoder.__dict__, **changes, config=config, read=config.reader(encoder.tokenizer))
    return copy


def assert_close(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float = 1e-5) -> None:
    assert [e.shape for e in found] == [e.shape for e in expected]
    assert max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True)) <= tolerance


def reference(folder: Path, captions: list[str], max_tokens: int = 128) -> list[np.ndarray]:
    """transformers by itself, one caption at a time, so that nothing is ever padded."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = T5EncoderModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [
            model(**tokenizer(c, truncation=True, max_length=max_tokens, return_tensors="pt"))
            .last_hidden_state[0]
            .float()
            .numpy()
            for c in captions
        ]


def test_embeddings_are_unpadded_and_finite(encoder: TextEncoder) -> None:
    encoded = encoder.encode(CAPTIONS)
    lengths = [len(encoder.tokenizer(caption)["input_ids"]) for caption in CAPTIONS]
    assert [e.shape for e in encoded.embeddings] == [(length, 64) for length in lengths]
    assert lengths[:3] == [8, 1, 2]
    assert all(e.dtype == np.float32 and np.isfinite(e).all() for e in encoded.embeddings)
    assert encoded.num_truncated == 0
    assert encoder.dim == 64


def test_the_result_is_what_transformers_gives_caption_by_caption(encoder: TextEncoder, folder: Path) -> None:
    assert_close(encoder.encode(CAPTIONS).embeddings, reference(folder, CAPTIONS))
    short = with_changes(encoder, max_tokens=5).encode(CAPTIONS).embeddings
    assert_close(short, reference(folder, CAPTIONS, max_tokens=5))


def test_a_local_folder_gives_the_same_as_the_built_in_name(encoder: TextEncoder, folder: Path) -> None:
    local = config(str(folder))
    found, expected = load_encoder(local, 1).encode(CAPTIONS).embeddings, encoder.encode(CAPTIONS).embeddings
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert local.identify() == config().identify()


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 64, 4096])
def test_the_result_does_not_depend_on_the_batches(encoder: TextEncoder, tokens_per_batch: int) -> None:
    expected = [encoder.encode([caption]).embeddings[0] for caption in CAPTIONS]
    other = with_changes(encoder, tokens_per_batch=tokens_per_batch)
    assert_close(other.encode(CAPTIONS).embeddings, expected)
    order = np.random.default_rng(0).permutation(len(CAPTIONS))
    mixed = other.encode([CAPTIONS[i] for i in order]).embeddings
    assert_close([mixed[position] for position in np.argsort(order)], expected)
    crowd = other.encode(CAPTIONS + ["other words"] * 50).embeddings
    assert_close(crowd[: len(CAPTIONS)], expected)


def test_bfloat16_differs_by_its_rounding_only(encoder: TextEncoder) -> None:
    expected = encoder.encode(CAPTIONS).embeddings
    found = load_encoder(config(compute_dtype="bfloat16"), 1).encode(CAPTIONS).embeddings
    assert all(e.dtype == np.float32 for e in found)
    for a, b in zip(found, expected, strict=True):
        assert np.linalg.norm(a - b) / np.linalg.norm(b) < 0.03


@pytest.mark.parametrize("limit", [2, 5, 8, 11])
def test_a_cut_caption_keeps_its_end_token_and_is_counted(encoder: TextEncoder, limit: int) -> None:
    short = with_changes(encoder, max_tokens=limit)
    whole = [encoder.tokenizer(caption)["input_ids"] for caption in CAPTIONS]
    token_ids, num_truncated = tokenize(encoder.tokenizer, CAPTIONS, limit)
    for found, full in zip(token_ids, whole, strict=True):
        assert found == (full if len(full) <= limit else [*full[: limit - 1], EOS])
        assert found.count(EOS) == 1
        assert found[-1] == EOS
    assert token_ids == [encoder.tokenizer(c, truncation=True, max_length=limit)["input_ids"] for c in CAPTIONS]
    encoded = short.encode(CAPTIONS)
    assert encoded.num_truncated == num_truncated == sum(len(full) > limit for full in whole)
    assert [len(e) for e in encoded.embeddings] == [min(len(full), limit) for full in whole]


def test_no_token_the_model_sees_is_padding(encoder: TextEncoder) -> None:
    seen: list[int] = []

    class Watched:
        padded = pooled = False

        def __call__(self, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
            seen.append(len(ids))
            return encoder.model(ids, lengths)

    encoded = with_changes(encoder, model=Watched()).encode(CAPTIONS)
    assert sum(seen) == sum(len(e) for e in encoded.embeddings)


def test_threads_share_a_model_and_wait_for_it(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = encoder.encode(CAPTIONS).embeddings
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(encoder.encode, [CAPTIONS] * 8))
    for encoded in found:
        assert all(np.array_equal(a, b) for a, b in zip(encoded.embeddings, expected, strict=True))
    model, waits = threading.Lock(), threading.Event()

    class Watched:
        def __enter__(self) -> None:
            waits.set()
            model.acquire()

        def __exit__(self, *_: object) -> None:
            model.release()

    monkeypatch.setattr(encoder, "_computing", Watched())
    model.acquire()
    with ThreadPoolExecutor(1) as one:
        future = one.submit(encoder.encode, CAPTIONS)
        assert waits.wait(60)
        time.sleep(0.05)
        model.release()
        assert future.result().waited_s >= 0.04


def test_the_workload_is_known_without_the_weights(encoder: TextEncoder, folder: Path, tmp_path: Path) -> None:
    light = tmp_path / TINY_MODEL
    shutil.copytree(folder, light)
    (light / "model.safetensors").write_bytes(b"")
    found = config(str(light), max_tokens=9).workload(CAPTIONS)
    lengths = [min(9, len(encoder.tokenizer(caption)["input_ids"])) for caption in CAPTIONS]
    assert found.tokens == lengths
    weights = 64 * (4 * 64 + 3 * 160)  # a layer's
    assert found.flops == 2 * 2 * sum(weights * n + 2 * n**2 * 64 for n in lengths)


def test_no_caption_is_no_work(encoder: TextEncoder) -> None:
    encoded = encoder.encode([])
    assert (encoded.embeddings, encoded.num_truncated) == ([], 0)


def test_a_hundred_thousand_characters_are_one_cut_caption(encoder: TextEncoder) -> None:
    encoded = encoder.encode(["word " * 20_000])
    assert (encoded.embeddings[0].shape, encoded.num_truncated) == ((128, 64), 1)


# ---- identity ----


def fingerprint(folder: Path, **changes: object) -> dict[str, object]:
    return config(str(folder), **changes).identify().fingerprint


def test_the_built_in_model_is_the_same_bytes_every_time(folder: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_the_fingerprint_names_all_that_decides_the_embeddings_and_no_path(folder: Path) -> None:
    found = fingerprint(folder)
    assert set(found) == {
        "model",
        "revision",
        "weights_sha256",
        "tokenizer_sha256",
        "kind",
        "max_tokens",
        "compute_dtype",
        "text_normalisation",
        "output",
        "model_config",
        "tokenizer",
    }
    assert (found["model"], found["revision"], found["max_tokens"]) == (TINY_MODEL, None, 128)
    assert str(folder.parent) not in json.dumps(found)
    assert "/" not in json.dumps(found).replace("</s>", "")


@pytest.mark.parametrize("how", ["moved", "trailing slash", "relative", "as the working directory"])
def test_moving_the_folder_keeps_the_fingerprint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    moved = tmp_path / "elsewhere" / TINY_MODEL
    shutil.copytree(folder, moved)
    monkeypatch.chdir(moved if how == "as the working directory" else tmp_path)
    path = {
        "moved": str(moved),
        "trailing slash": f"{moved}/",
        "relative": f"elsewhere/{TINY_MODEL}",
        "as the working directory": ".",
    }[how]
    assert config(path).identify().fingerprint == fingerprint(folder)


def test_one_changed_weight_changes_the_weights_hash_alone(folder: Path, tmp_path: Path) -> None:
    changed = tmp_path / TINY_MODEL
    shutil.copytree(folder, changed)
    weights = load_file(changed / "model.safetensors")
    weights["shared.weight"][5, 7] += 1e-3
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    assert differing(fingerprint(folder), fingerprint(changed)) == {"weights_sha256"}


def test_a_changed_tokenizer_changes_what_is_said_of_the_tokenizer_alone(folder: Path, tmp_path: Path) -> None:
    changed = tmp_path / TINY_MODEL
    shutil.copytree(folder, changed)
    text = (changed / "tokenizer.json").read_text(encoding="utf-8")
    (changed / "tokenizer.json").write_text(text.replace('"▁red"', '"▁rot"'), encoding="utf-8")
    assert differing(fingerprint(folder), fingerprint(changed)) == {"tokenizer_sha256", "tokenizer"}


def test_settings_that_change_the_embeddings_change_the_fingerprint_and_others_do_not(folder: Path) -> None:
    plain = fingerprint(folder)
    assert differing(plain, fingerprint(folder, max_tokens=64)) == {"max_tokens"}
    assert differing(plain, fingerprint(folder, compute_dtype="bfloat16")) == {"compute_dtype"}
    assert fingerprint(folder, tokens_per_batch=7, workers=3, num_cpus=2, cpu_threads=1) == plain


def differing(a: dict[str, object], b: dict[str, object]) -> set[str]:
    assert set(a) == set(b)
    return {key for key in a if a[key] != b[key]}


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("config.json", "has no config.json; give a folder saved by save_pretrained"),
        ("model.safetensors", r"has no model\*\.safetensors or pytorch_model\*\.bin"),
        ("tokenizer.json", "no tokenizer files"),
    ],
)
def test_a_folder_that_lacks_a_file_is_named(folder: Path, tmp_path: Path, missing: str, says: str) -> None:
    broken = tmp_path / TINY_MODEL
    shutil.copytree(folder, broken)
    (broken / missing).unlink()
    if missing == "tokenizer.json":
        (broken / "tokenizer_config.json").unlink()
    with pytest.raises(MachineError, match=rf"encoders\.model: .*{says}"):
        config(str(broken)).identify()


def test_a_model_of_another_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "bert"
    shutil.copytree(folder, other)
    (other / "config.json").write_text('{"model_type": "bert", "hidden_size": 64}')
    with pytest.raises(ConfigError, match=r"is no T5 \(model_type 'bert' in config\.json\); give a T5"):
        config(str(other)).identify()


def test_a_missing_weight_is_an_error_and_never_random_numbers(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / TINY_MODEL
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MachineError, match=r"lacks 1 weights of a T5EncoderModel \(encoder\.block\.1\."):
        load_encoder(config(str(broken)), 1)


def test_weights_beside_those_of_the_encoder_are_ignored(encoder: TextEncoder, folder: Path, tmp_path: Path) -> None:
    whole = tmp_path / TINY_MODEL
    shutil.copytree(folder, whole)
    weights = load_file(whole / "model.safetensors")
    save_file(
        {**weights, "decoder.block.0.layer.0.SelfAttention.q.weight": np.zeros((64, 64), np.float32)},
        whole / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert_close(load_encoder(config(str(whole)), 1).encode(CAPTIONS).embeddings, encoder.encode(CAPTIONS).embeddings)


def test_cut_weights_are_an_error_of_the_machine(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / TINY_MODEL
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(MachineError, match=r"encoders\.model: .* cannot be loaded"):
        load_encoder(config(str(broken)), 1)


def test_the_workload_counts_the_tokens_and_products_of_the_model(tmp_path: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    write_tiny_model(tmp_path / "model")
    config = T5EncoderConfig(name="t5", model=str(tmp_path / "model"), max_tokens=12, compute_dtype="float32")
    work = config.workload(CAPTIONS)
    assert work.tokens == [len(e) for e in load_encoder(config, 1).encode(CAPTIONS).embeddings]
    model = T5EncoderModel.from_pretrained(tmp_path / "model", dtype=torch.float32, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        for length in work.tokens:
            model(torch.full((1, length), 5))
    assert work.flops == counter.get_total_flops()


def test_the_workload_needs_no_weights(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(b"")
    assert sum(T5EncoderConfig(name="t5", model=str(tmp_path / "model")).workload(CAPTIONS).tokens) > len(CAPTIONS)
