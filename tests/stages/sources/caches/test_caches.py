"""Text caches of other trainers become groups of a store: the text's tokens bit for bit, or a counted drop."""

import gzip
import hashlib
import io
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from imagen_core.store import Store, verify_store
from pipeline.config import load_config
from pipeline.errors import ConfigError, PipelineError, StaleOutputError
from pipeline.storage.open import open_storage
from stages.precompute.given_embeddings import PrecomputedEmbeddingsStage
from tests.commands import call
from tests.images import plain_png
from tests.object_store import object_store
from tests.runs import precompute, precompute_interrupted, store_bytes
from workflows.precompute_config import PrecomputeConfig

DIM = 8
PADDED = 12
ANY_DROPS = "max_drop_fraction=1"
LENGTHS = (3, 1, 5, 12, 2)
NAMES = ("0.png", "a/1.png", "a/2.png", "b/4.v2.png", "b/c/3.png")

Write = Callable[[Path, str, str, np.ndarray, np.ndarray], None]
"""Writes a cache file: root of images, image, caption, (PADDED, DIM) states, (PADDED,) mask."""


def states(seed: int) -> np.ndarray:
    """(PADDED, DIM) states, also of the pads, as a T5 encoder gives them; float16 and bfloat16 hold them exactly."""
    return np.random.default_rng(seed).integers(1, 100, (PADDED, DIM)).astype(np.float32) / 16


def masked(length: int) -> np.ndarray:
    return (np.arange(PADDED) < length).astype(np.int64)


def caption_of(image: str) -> str:
    return f"the image {image}"


def images(root: Path) -> Path:
    for name in NAMES:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(plain_png())
        path.with_suffix(".txt").write_text(f"  {caption_of(name)}\n")
    return root


def fill(root: Path, write: Write) -> None:
    for seed, (name, length) in enumerate(zip(NAMES, LENGTHS, strict=True)):
        write(root, name, caption_of(name), states(seed), masked(length))


def settings(root: Path, cache: str, *more: str, dim: int = DIM) -> tuple[str, ...]:
    return (
        *("source.kind=folder", f"source.path={root}", f"source.arrays={{t5: {cache}}}", "shard_size=2"),
        *("images.sizes_px=[16]", "store.dtype=float32"),
        *(f"encoders=[{{name: t5, kind: given, array: t5, model: google/t5-v1_1-xxl, dim: {dim}}}]", *more),
    )


# ---- the files, as each trainer writes them ----


def write_pixart(folder: Path, name: str, dtype: Any, mask_dtype: Any) -> Write:
    def write(root: Path, image: str, caption: str, array: np.ndarray, mask: np.ndarray) -> None:
        del root, caption
        stem = image.removesuffix(".png")
        path = folder / f"{'_'.join(stem.rsplit('/', 1)) if name == 'alpha' else stem.rsplit('/', 1)[-1]}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            path, caption_feature=array.astype(dtype)[None], attention_mask=mask.astype(mask_dtype)[None]
        )

    return write


def write_flux(*, applied: bool = False) -> Write:
    def write(root: Path, image: str, caption: str, array: np.ndarray, mask: np.ndarray) -> None:
        del caption
        np.savez(
            f"{root / image.removesuffix('.png')}_flux_te.npz",
            l_pooled=array[0] + 1,
            t5_out=array,
            txt_ids=np.zeros((PADDED, 3), np.float32),
            t5_attn_mask=mask,
            apply_t5_attn_mask=applied,
        )

    return write


def write_sd3(root: Path, image: str, caption: str, array: np.ndarray, mask: np.ndarray) -> None:
    del caption
    np.savez(
        f"{root / image.removesuffix('.png')}_sd3_te.npz",
        lg_out=array + 1,
        lg_pooled=array[0] + 2,
        t5_out=array,
        clip_l_attn_mask=mask,
        clip_g_attn_mask=mask,
        t5_attn_mask=mask,
        apply_lg_attn_mask=np.array(False),
        apply_t5_attn_mask=np.array(True),
    )


def write_sdxl(root: Path, image: str, caption: str, array: np.ndarray, mask: np.ndarray) -> None:
    del caption, mask
    path = f"{root / image.removesuffix('.png')}_te_outputs.npz"
    np.savez(path, hidden_state1=array, hidden_state2=array + 1, pool2=array[0])


def write_musubi(folder: Path, architecture: str, tensors: Callable[[torch.Tensor, torch.Tensor], Any]) -> Write:
    def write(root: Path, image: str, caption: str, array: np.ndarray, mask: np.ndarray) -> None:
        del root
        folder.mkdir(exist_ok=True)
        path = folder / f"{image.removesuffix('.png').rsplit('/', 1)[-1]}_{architecture}_te.safetensors"
        metadata = {"architecture": architecture, "caption1": caption, "format_version": "1.0.1"}
        save_file(tensors(torch.from_numpy(array), torch.from_numpy(mask)), path, metadata)

    return write


def qwen_image(array: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"varlen_vl_embed_bfloat16": array[: int(mask.sum())].to(torch.bfloat16)}


def kontext(array: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    del mask
    return {"t5_vec_bfloat16": array.to(torch.bfloat16), "clip_l_pooler_float32": array[0].clone()}


def hunyuan(array: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"llm_float16": array.half(), "llm_mask": mask, "clipL_float16": array[1].half()}


def simpletuner_path(folder: Path, caption: str) -> Path:
    return folder / f"{hashlib.md5(caption.encode()).hexdigest()}-flux.pt"


def write_simpletuner(folder: Path, *, compress: bool = False) -> Write:
    def write(root: Path, image: str, caption: str, array: np.ndarray, mask: np.ndarray) -> None:
        del root, image
        folder.mkdir(exist_ok=True)
        tensor = torch.from_numpy(array)
        content = {
            "prompt_embeds": tensor[None].to(torch.bfloat16),
            "pooled_prompt_embeds": tensor[0].to(torch.bfloat16),
            "time_ids": torch.zeros(PADDED, 3),
            "attention_masks": torch.from_numpy(mask)[None],
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        data = gzip.compress(buffer.getvalue()) if compress else buffer.getvalue()
        simpletuner_path(folder, caption).write_bytes(data)

    return write


# ---- what becomes of them ----


def text(array: np.ndarray, length: int) -> np.ndarray:
    return array[:length]


def whole(array: np.ndarray, length: int) -> np.ndarray:
    del length
    return array


FORMATS: dict[str, tuple[Callable[[Path], Write], str, Callable[[np.ndarray, int], np.ndarray]]] = {
    "pixart alpha": (
        lambda cache: write_pixart(cache, "alpha", np.float32, np.int64),
        "{kind: pixart, model: alpha, folder: CACHE}",
        text,
    ),
    "pixart sigma": (
        lambda cache: write_pixart(cache, "sigma", np.float16, np.int16),
        "{kind: pixart, model: sigma, folder: CACHE}",
        text,
    ),
    "kohya flux": (lambda _: write_flux(), "{kind: kohya, model: flux, array: t5_out}", text),
    "kohya flux, masked": (
        lambda _: write_flux(applied=True),
        "{kind: kohya, model: flux, array: t5_out, apply_attn_mask: true}",
        text,
    ),
    "kohya flux with pads": (
        lambda _: write_flux(),
        "{kind: kohya, model: flux, array: t5_out, pads: keep}",
        whole,
    ),
    "kohya flux pooled": (
        lambda _: write_flux(),
        "{kind: kohya, model: flux, array: l_pooled}",
        lambda array, _: array[:1] + 1,
    ),
    "kohya sd3": (
        lambda _: write_sd3,
        "{kind: kohya, model: sd3, array: t5_out, apply_attn_mask: true}",
        text,
    ),
    "kohya sd3 clip": (lambda _: write_sd3, "{kind: kohya, model: sd3, array: lg_out}", lambda array, _: array + 1),
    "kohya sdxl": (
        lambda _: write_sdxl,
        "{kind: kohya, model: sdxl, array: hidden_state2}",
        lambda array, _: array + 1,
    ),
    "musubi varlen": (
        lambda cache: write_musubi(cache, "qi", qwen_image),
        "{kind: musubi, architecture: qi, array: vl_embed, folder: CACHE}",
        text,
    ),
    "musubi without a mask": (
        lambda cache: write_musubi(cache, "fk", kontext),
        "{kind: musubi, architecture: fk, array: t5_vec, folder: CACHE}",
        whole,
    ),
    "musubi pooled": (
        lambda cache: write_musubi(cache, "fk", kontext),
        "{kind: musubi, architecture: fk, array: clip_l_pooler, folder: CACHE}",
        lambda array, _: array[:1],
    ),
    "musubi with a mask": (
        lambda cache: write_musubi(cache, "hv", hunyuan),
        "{kind: musubi, architecture: hv, array: llm, folder: CACHE}",
        text,
    ),
    "simpletuner": (write_simpletuner, "{kind: simpletuner, model: flux, folder: CACHE}", text),
    "simpletuner, compressed": (
        lambda cache: write_simpletuner(cache, compress=True),
        "{kind: simpletuner, model: flux, folder: CACHE}",
        text,
    ),
    "simpletuner pooled": (
        write_simpletuner,
        "{kind: simpletuner, model: flux, array: pooled_prompt_embeds, folder: CACHE}",
        lambda array, _: array[:1],
    ),
}


@pytest.mark.parametrize("form", FORMATS)
def test_the_text_of_a_cache_is_in_the_store_bit_for_bit(tmp_path: Path, form: str) -> None:
    writer, cache, expected = FORMATS[form]
    root = images(tmp_path / "images")
    fill(root, writer(tmp_path / "cache"))
    precompute(tmp_path / "run", *settings(root, cache.replace("CACHE", str(tmp_path / "cache"))))
    store = Store.open(tmp_path / "run" / "store")
    assert [sample.key for sample in store] == list(NAMES)
    for seed, (sample, length) in enumerate(zip(store, LENGTHS, strict=True)):
        assert sample.captions == [caption_of(sample.key)]
        assert sample.images[16].shape == (16, 16, 3)
        np.testing.assert_array_equal(sample.text["t5"], [expected(states(seed), length)])
    assert verify_store(tmp_path / "run" / "store").ok


@pytest.mark.parametrize("form", ["musubi varlen", "simpletuner"])
def test_bfloat16_is_kept_in_all_its_bits(tmp_path: Path, form: str) -> None:
    writer, cache, _ = FORMATS[form]
    root = images(tmp_path / "images")
    large = (torch.randn(PADDED, DIM, generator=torch.Generator().manual_seed(0)) * 1e6).to(torch.bfloat16)
    writer(tmp_path / "cache")(root, NAMES[0], caption_of(NAMES[0]), large.float().numpy(), masked(4))
    config = settings(root, cache.replace("CACHE", str(tmp_path / "cache")), "store.dtype=bfloat16", ANY_DROPS)
    precompute(tmp_path / "run", *config)
    (one,) = Store.open(tmp_path / "run" / "store")
    np.testing.assert_array_equal(one.text["t5"][0], large[:4].float())


def test_the_fingerprint_says_that_the_embeddings_were_given_and_how_the_cache_was_read(tmp_path: Path) -> None:
    root = images(tmp_path / "images")
    fill(root, write_flux(applied=True))
    cache = "{kind: kohya, model: flux, array: t5_out, apply_attn_mask: true}"
    precompute(tmp_path / "run", *settings(root, cache))
    group = Store.open(tmp_path / "run" / "store").text_group("t5")
    array = {"name": "t5", "kind": "kohya", "model": "flux", "array": "t5_out", "apply_attn_mask": True}
    assert (group.fingerprint["kind"], group.fingerprint["array"]) == ("given", array)
    with pytest.raises(StaleOutputError, match="pads"):
        precompute(tmp_path / "run", *settings(root, cache.replace("}", ", pads: keep}")))


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = images(tmp_path / "images")
    fill(root, write_flux())
    config = settings(root, "{kind: kohya, model: flux, array: t5_out}")
    precompute(tmp_path / "whole", *config)
    precompute_interrupted(
        PrecomputedEmbeddingsStage, (True, False, True, False), tmp_path / "run", *config, patch=monkeypatch
    )
    assert store_bytes(tmp_path / "run") == store_bytes(tmp_path / "whole")


def test_a_cache_can_be_added_to_a_finished_run(tmp_path: Path) -> None:
    root = images(tmp_path / "images")
    base = settings(root, "{kind: kohya, model: flux, array: t5_out}")
    precompute(tmp_path / "run", *base, "source.arrays={}", "encoders=[]")
    before = store_bytes(tmp_path / "run")
    fill(root, write_flux())
    precompute(tmp_path / "run", *base)
    after = store_bytes(tmp_path / "run")
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }
    assert len(Store.open(tmp_path / "run" / "store")[3].text["t5"][0]) == LENGTHS[3]


def test_a_cache_that_was_completed_is_read_again_where_the_group_was_deleted(tmp_path: Path) -> None:
    root = images(tmp_path / "images")
    fill(root, write_flux())
    config = settings(root, "{kind: kohya, model: flux, array: t5_out}")
    precompute(tmp_path / "whole", *config)
    lost = root / "a" / "1_flux_te.npz"
    whole_file = lost.read_bytes()
    lost.unlink()
    precompute(tmp_path / "run", *config)
    lost.write_bytes(whole_file)
    assert precompute(tmp_path / "run", *config)["num_samples"] == len(NAMES) - 1, "finished shards stay as they are"
    rmtree(tmp_path / "run" / "store" / "text-t5")
    precompute(tmp_path / "run", *config)
    assert store_bytes(tmp_path / "run") == store_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_worker_processes_make_the_same_bytes(tmp_path: Path) -> None:
    root = images(tmp_path / "images")
    fill(root, write_simpletuner(tmp_path / "cache"))
    config = settings(root, f"{{kind: simpletuner, model: flux, folder: {tmp_path / 'cache'}}}")
    for executor in ("inline", "local"):
        precompute(tmp_path / executor, *config, executor=executor)
    assert store_bytes(tmp_path / "local") == store_bytes(tmp_path / "inline")


@pytest.mark.parametrize("more", [(), ("--probe", "--executor", "inline")])
def test_plan_says_what_the_run_would_write_and_writes_nothing(tmp_path: Path, more: tuple[str, ...]) -> None:
    root = images(tmp_path / "images")
    fill(root, write_flux())
    config = settings(root, "{kind: kohya, model: flux, array: t5_out}")
    planned = call("plan", "precompute", "--out", str(tmp_path / "run"), "--json", *more, *config)
    assert (planned.code, '"text-t5"' in planned.out) == (0, True), planned.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_cache_behind_a_url_is_read(tmp_path: Path) -> None:
    root = images(tmp_path / "images")
    fill(root, write_simpletuner(tmp_path / "cache"))
    config = "{kind: simpletuner, model: flux, folder: FOLDER}"
    with object_store() as s3:
        for path in (tmp_path / "cache").iterdir():
            open_storage(f"{s3.url}/cache").write(path.name, path.read_bytes())
        precompute(tmp_path / "far", *settings(root, config.replace("FOLDER", f"{s3.url}/cache")))
    precompute(tmp_path / "near", *settings(root, config.replace("FOLDER", str(tmp_path / "cache"))))
    assert store_bytes(tmp_path / "far") == store_bytes(tmp_path / "near")


class Code:
    """A pickle that would write a file if it were run."""

    def __init__(self, place: str):
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.place,)


def flux_file(root: Path, image: str, **changed: Any) -> None:
    """A flux cache file of which some arrays are others; None leaves one out."""
    arrays: dict[str, Any] = {"l_pooled": states(0)[0], "t5_out": states(0), "t5_attn_mask": masked(3)}
    arrays |= {"apply_t5_attn_mask": False, **changed}
    there = {name: value for name, value in arrays.items() if value is not None}
    np.savez(f"{root / image.removesuffix('.png')}_flux_te.npz", **there)


HOLES = np.array([1, 1, 0, 1, *[0] * 8])
FLUX_DAMAGE: Mapping[str, tuple[str, Callable[[Path], object]]] = {
    "no file": ("missing_embedding", lambda path: path.unlink()),
    "a cut file": ("unreadable_embedding", lambda path: path.write_bytes(path.read_bytes()[:-40])),
    "a flipped byte": ("unreadable_embedding", lambda path: path.write_bytes(_flipped(path.read_bytes()))),
    "no .npz": ("unreadable_embedding", lambda path: path.write_bytes(b"x" * 500)),
    "one array": ("unreadable_embedding", lambda path: path.write_bytes(_npy(states(0)))),
    "a mask with holes": ("mask_with_holes", lambda path: _rewrite(path, t5_attn_mask=HOLES)),
    "an empty mask": ("missing_embedding", lambda path: _rewrite(path, t5_attn_mask=masked(0))),
    "a mask of another length": ("unreadable_embedding", lambda path: _rewrite(path, t5_attn_mask=np.ones(5))),
    "no mask": ("missing_embedding", lambda path: _rewrite(path, t5_attn_mask=None)),
    "another recipe": ("other_recipe", lambda path: _rewrite(path, apply_t5_attn_mask=True)),
    "another width": ("other_width", lambda path: _rewrite(path, t5_out=np.ones((PADDED, DIM + 1), np.float32))),
    "text": ("unreadable_embedding", lambda path: _rewrite(path, t5_out=np.full((PADDED, DIM), "x"))),
    "objects": ("unreadable_embedding", lambda path: _rewrite(path, t5_out=np.full((PADDED, DIM), None))),
    "NaN": ("non_finite_embedding", lambda path: _rewrite(path, t5_out=np.full((PADDED, DIM), np.nan))),
}


def _flipped(data: bytes) -> bytes:
    place = data.index(states(1).tobytes()) + 5
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _rewrite(path: Path, **changed: Any) -> None:
    flux_file(path.parents[1], f"a/{path.name.removesuffix('_flux_te.npz')}.png", **changed)


@pytest.mark.parametrize("case", FLUX_DAMAGE)
def test_a_file_that_has_no_embedding_of_its_image_is_a_counted_drop_of_that_image(tmp_path: Path, case: str) -> None:
    reason, damage = FLUX_DAMAGE[case]
    root = images(tmp_path / "images")
    fill(root, write_flux())
    damage(root / "a" / "1_flux_te.npz")
    summary = precompute(tmp_path / "run", *settings(root, "{kind: kohya, model: flux, array: t5_out}"))
    assert summary["tally"]["groups"]["text-t5"]["drops"] == {reason: 1}
    store = Store.open(tmp_path / "run" / "store")
    assert [sample.key for sample in store] == [name for name in NAMES if name != "a/1.png"]
    assert verify_store(tmp_path / "run" / "store").ok


def test_text_behind_its_padding_is_cut_out_too(tmp_path: Path) -> None:
    root = images(tmp_path / "images")
    for name in NAMES:
        flux_file(root, name, t5_attn_mask=np.arange(PADDED) >= 9)
    precompute(tmp_path / "run", *settings(root, "{kind: kohya, model: flux, array: t5_out}"))
    for sample in Store.open(tmp_path / "run" / "store"):
        np.testing.assert_array_equal(sample.text["t5"], [states(0)[9:]])


@pytest.mark.parametrize("damage", [None, b"x" * 500])
def test_a_configured_width_that_no_file_has_is_refused_by_file_and_value(
    tmp_path: Path, damage: bytes | None
) -> None:
    root = images(tmp_path / "images")
    fill(root, write_flux())
    if damage is not None:
        (root / "a" / "1_flux_te.npz").write_bytes(damage)
    config = settings(root, "{kind: kohya, model: flux, array: t5_out}", "shard_size=5", dim=4096)
    message = r"source.arrays.t5: 0_flux_te.npz of 0.png: shape \(3, 8\), which is not \(4096,\) or \(tokens, 4096\)"
    with pytest.raises(PipelineError, match=message):
        precompute(tmp_path / "run", *config)


def test_a_file_of_another_caption_is_a_counted_drop(tmp_path: Path) -> None:
    root, cache = images(tmp_path / "images"), tmp_path / "cache"
    fill(root, write_musubi(cache, "qi", qwen_image))
    write_musubi(cache, "qi", qwen_image)(root, NAMES[2], "a caption that was changed", states(2), masked(5))
    config = settings(root, f"{{kind: musubi, architecture: qi, array: vl_embed, folder: {cache}}}")
    summary = precompute(tmp_path / "run", *config)
    assert summary["tally"]["groups"]["text-t5"]["drops"] == {"other_caption": 1}
    (root / NAMES[2]).with_suffix(".txt").write_text("a caption that was changed")
    assert precompute(tmp_path / "again", *config)["tally"]["groups"]["text-t5"]["drops"] == {}


def test_two_precisions_of_one_array_are_a_counted_drop(tmp_path: Path) -> None:
    root, cache = images(tmp_path / "images"), tmp_path / "cache"

    def both(array: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**qwen_image(array, mask), "varlen_vl_embed_float8_e4m3fn": array.to(torch.float8_e4m3fn)}

    def fp8(array: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"varlen_vl_embed_float8_e4m3fn": array[: int(mask.sum())].to(torch.float8_e4m3fn)}

    fill(root, write_musubi(cache, "qi", qwen_image))
    write_musubi(cache, "qi", both)(root, NAMES[0], caption_of(NAMES[0]), states(0), masked(3))
    write_musubi(cache, "qi", fp8)(root, NAMES[1], caption_of(NAMES[1]), states(1), masked(1))
    (cache / "2_qi_te.safetensors").write_bytes((cache / "2_qi_te.safetensors").read_bytes()[:-1])
    write_musubi(cache, "qi", kontext)(root, NAMES[3], caption_of(NAMES[3]), states(3), masked(3))
    config = settings(root, f"{{kind: musubi, architecture: qi, array: vl_embed, folder: {cache}}}", ANY_DROPS)
    summary = precompute(tmp_path / "run", *config)
    drops = {"ambiguous_embedding": 1, "unreadable_embedding": 2, "missing_embedding": 1}
    assert summary["tally"]["groups"]["text-t5"]["drops"] == drops


def test_a_pt_file_with_code_is_a_counted_drop_and_the_code_does_not_run(tmp_path: Path) -> None:
    root, cache = images(tmp_path / "images"), tmp_path / "cache"
    fill(root, write_simpletuner(cache))
    ran = tmp_path / "ran"
    torch.save({"prompt_embeds": Code(str(ran))}, simpletuner_path(cache, caption_of(NAMES[0])))
    simpletuner_path(cache, caption_of(NAMES[1])).write_bytes(pickle.dumps(Code(str(ran))))
    torch.save((torch.ones(1, PADDED, DIM),), simpletuner_path(cache, caption_of(NAMES[2])))
    whole_file = simpletuner_path(cache, caption_of(NAMES[3]))
    whole_file.write_bytes(whole_file.read_bytes()[:-200])
    summary = precompute(
        tmp_path / "run", *settings(root, f"{{kind: simpletuner, model: flux, folder: {cache}}}", ANY_DROPS)
    )
    assert summary["tally"]["groups"]["text-t5"]["drops"] == {"unreadable_embedding": 4}
    assert not ran.exists()
    assert [sample.key for sample in Store.open(tmp_path / "run" / "store")] == [NAMES[4]]


@pytest.mark.parametrize("compress", [False, True])
def test_a_flipped_byte_in_a_pt_file_is_a_counted_drop(tmp_path: Path, compress: bool) -> None:
    root, cache = images(tmp_path / "images"), tmp_path / "cache"
    fill(root, write_simpletuner(cache))
    path = simpletuner_path(cache, caption_of(NAMES[1]))
    data = bytearray(path.read_bytes())
    data[bytes(data).index(torch.from_numpy(states(1)).bfloat16().view(torch.uint16).numpy().tobytes()) + 5] ^= 1
    path.write_bytes(gzip.compress(bytes(data)) if compress else data)
    summary = precompute(tmp_path / "run", *settings(root, f"{{kind: simpletuner, model: flux, folder: {cache}}}"))
    assert summary["tally"]["groups"]["text-t5"]["drops"] == {"unreadable_embedding": 1}


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("{kind: kohya, model: flux, array: t5}", "array 't5' is not in caches of flux, which have t5_out, l_pooled"),
        ("{kind: kohya, model: sdxl, array: pool2, apply_attn_mask: true}", "apply_attn_mask is for t5_out"),
        ("{kind: pixart, model: sigma}", "folder: needed, but not given"),
        ("{kind: comfy}", "choose from pixart, kohya, musubi, simpletuner"),
        ("{kind: pixart, model: sigma, folder: /nowhere/at/all}", "t5.folder: /nowhere/at/all is not a folder"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, cache: str, message: str) -> None:
    root = images(tmp_path / "images")
    with pytest.raises(ConfigError, match=message):
        precompute(tmp_path / "run", *settings(root, cache))
    assert not (tmp_path / "run" / "store").exists()


def test_an_array_that_no_cache_has_is_refused(tmp_path: Path) -> None:
    root = images(tmp_path / "images")
    config = settings(root, "{kind: kohya, model: flux, array: t5_out}", "encoders.0.array=clip")
    with pytest.raises(ConfigError, match=r"array 'clip' is not in source.arrays, which has: t5"):
        precompute(tmp_path / "run", *config)


def test_files_next_to_the_images_of_a_table_are_found(tmp_path: Path) -> None:
    root = images(tmp_path / "data" / "images")
    fill(root, write_flux())
    rows = [f"{name}\t{caption_of(name)}" for name in NAMES]
    (root.parent / "captions.tsv").write_text("\n".join(["file\tcaption", *rows, "\tno file", "../x.png\toutside"]))
    summary = precompute(tmp_path / "run", *settings(root.parent, "{kind: kohya, model: flux, array: t5_out}"))
    assert summary["tally"]["groups"]["text-t5"]["drops"] == {}
    for sample, length in zip(Store.open(tmp_path / "run" / "store"), LENGTHS, strict=True):
        np.testing.assert_array_equal(sample.text["t5"], [states(NAMES.index(sample.key))[:length]])


@pytest.mark.parametrize("table", [False, True])
def test_two_images_of_one_cache_file_are_refused_by_name(tmp_path: Path, table: bool) -> None:
    root, cache = images(tmp_path / "images"), tmp_path / "cache"
    cache.mkdir()
    (root / "b" / "1.png").write_bytes(plain_png())
    if table:
        (root / "captions.tsv").write_text("file\tcaption\na/1.png\ta\na/1.png\ta\nb/1.png\tb\n")
    config = settings(root, f"{{kind: pixart, model: sigma, folder: {cache}}}")
    source = load_config(PrecomputeConfig, None, config).source.build()
    with pytest.raises(ConfigError, match=r"b/1.png and an image before it would both be read from 1.npz"):
        source.check()
    by_path = settings(root, f"{{kind: pixart, model: alpha, folder: {cache}}}")
    load_config(PrecomputeConfig, None, by_path).source.build().check()
