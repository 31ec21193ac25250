"""Words to be written, from the command line: precompute, train, sample."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from imagen_core.store import Store
from stages.sources.synthetic.words import dots, is_held_out_word
from tests.commands import Result, call, precompute
from tests.trained import train

UNET = {
    "family": "regular",
    "image_size_px": 16,
    "embed_dim": 32,
    "channel_mult": [1, 1],
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "attention_type": "self",
    "head_dim": 16,
    "text_dim": None,
    "transcription": {"dim": 16, "depth": 1, "head_dim": 8, "max_characters": 4, "resolutions": [8], "gain": 1.0},
}
WORDS = ["source.scene=words", "source.dead_links=0", "images.sizes_px=[16]", "encoders=[]"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 24 words, and a model trained on it for four steps."""
    folder = tmp_path_factory.mktemp("words")
    result = precompute(folder / "run", "source.num_samples=24", *WORDS)
    assert result.code == 0, result.err
    config = {
        "store": str(folder / "run/store"),
        "denoiser": {"size_px": 16, "unet": UNET},
        "num_steps": 4,
        "batch_size": 4,
        "optimizer": {"lr": 0.02, "warmup_steps": 0},
        "checkpoints": {"every_steps": 4},
        "logging": {"every_steps": 1},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(config))
    result = train(folder, "base", folder / "base")
    assert result.code == 0, result.err
    return folder


def sample(work: Path, out: Path, *more: str, guidance: float = 3.0) -> Result:
    sampling = {"num_steps": 2, "guidance": {"transcription": guidance}}
    stage = {"checkpoint": str(work / "base"), "weights": "model", "sampling": sampling}
    out.with_suffix(".yaml").write_text(yaml.safe_dump({"stages": [stage], "device": "cpu"}))
    return call("run", "sample", "-c", str(out.with_suffix(".yaml")), "--out", str(out), "--quiet", *more)


def sampled(out: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((out / "images-16").iterdir())]


def test_a_store_has_the_transcriptions_of_its_images(work: Path) -> None:
    store = Store.open(work / "run" / "store")
    assert len(store) == 24
    for each in store:
        assert each.transcription is not None
        distance = np.abs(each.images[16] - each.images[16][0, 0].astype(int)).sum(axis=-1)  # from the background
        assert np.array_equal(distance > distance.max() / 2, dots(each.transcription))
        assert not is_held_out_word(each.transcription)


def test_words_come_alike_from_lists_files_and_stores(work: Path, tmp_path: Path) -> None:
    prompts = ["prompts=[a,b]", "transcriptions=[AB,C]"]
    assert sample(work, tmp_path / "list", *prompts).code == 0
    (tmp_path / "prompts.txt").write_text("a\tAB\n\nb\tC\n")
    assert sample(work, tmp_path / "file", f"prompts_file={tmp_path}/prompts.txt").code == 0
    assert sample(work, tmp_path / "alone", "transcriptions=[AB,C]").code == 0
    assert sample(work, tmp_path / "none", "prompts=[a,b]").code == 0
    assert sampled(tmp_path / "list") == sampled(tmp_path / "file") == sampled(tmp_path / "alone")
    assert all(a != b for a, b in zip(sampled(tmp_path / "list"), sampled(tmp_path / "none"), strict=True))
    record = json.loads((tmp_path / "file" / "images.json").read_text())
    assert [(each["prompt"], each["transcription"]) for each in record["images"]] == [("a", "AB"), ("b", "C")]
    captions = [f"captions.path={work}/run", "captions.kind=store", "captions.num_captions=2"]
    assert sample(work, tmp_path / "store", *captions).code == 0
    record = json.loads((tmp_path / "store" / "images.json").read_text())
    written = {each.key: each.transcription for each in Store.open(work / "run" / "store")}
    assert [each["transcription"] for each in record["images"]] == [written[e["key"]] for e in record["images"]]


def test_other_words_are_another_sampling(work: Path, tmp_path: Path) -> None:
    assert sample(work, tmp_path / "out", "transcriptions=[AB]").code == 0
    changed = sample(work, tmp_path / "out", "transcriptions=[CD]")
    assert changed.code == 2
    assert "transcription" in changed.err
    assert "AB" in changed.err


def test_the_guidance_weight_of_transcriptions_changes_the_image(work: Path, tmp_path: Path) -> None:
    for weight in (1.0, 5.0):
        assert sample(work, tmp_path / f"{weight}", "transcriptions=[AB]", guidance=weight).code == 0
    one, five = (np.asarray(Image.open(tmp_path / f"{w}" / "images-16/00000.png")) for w in (1.0, 5.0))
    assert (one != five).any()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("transcriptions=[ABCDE]", "transcription 'ABCDE': 5 bytes in UTF-8, but the model reads at most 4"),
        ("transcriptions=[A,B]", "transcriptions has 2 entries for 1 prompts; give one each"),
        ("prompts_file=p.txt", "give one of prompts, prompts_file and captions"),
    ],
)
def test_bad_transcriptions_are_named(work: Path, tmp_path: Path, override: str, words: str) -> None:
    result = sample(work, tmp_path / "s", "prompts=[a]", override)
    assert result.code == 2
    assert words in result.err


def test_a_model_that_reads_none_refuses_them_and_a_store_without_them_is_refused(work: Path, tmp_path: Path) -> None:
    changes = ["denoiser.unet.transcription=null", "denoiser.unet.num_classes=null"]
    assert train(work, "base", tmp_path / "base", *changes).code == 0
    plain = "stages.0.sampling.guidance={}"
    refused = sample(tmp_path, tmp_path / "s", plain, "transcriptions=[AB]")
    assert refused.code == 2
    assert "transcriptions: no stage reads them (got 'AB')" in refused.err
    assert sample(tmp_path, tmp_path / "store", plain, f"captions.path={work}/run", "captions.kind=store").code == 0
    weighed = sample(tmp_path, tmp_path / "w", "prompts=[a]")
    assert "guidance.transcription is 3, but the model was not trained with it" in weighed.err
    unwritten = ["source.num_samples=4", "source.dead_links=0", "images.sizes_px=[16]", "encoders=[]"]
    assert precompute(tmp_path / "run", *unwritten).code == 0
    result = train(work, "base", tmp_path / "b", f"store={tmp_path}/run/store")
    assert result.code != 0
    assert "has no transcriptions" in result.err
