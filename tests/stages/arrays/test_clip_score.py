"""`stages: [{kind: clip_score}]`: the similarity of images and captions against transformers' CLIPModel."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel

from imagen_core.conditions import ConditionError
from imagen_core.store import Store, verify_store
from pipeline.errors import ConfigError
from stages.browse.store.table import SamplesTable
from tests.caption_server import Asked, CaptionServer, serve
from tests.runs import precompute, store_bytes
from tests.stages.browse.store.test_caption_sets import rows
from tests.stages.encoders import tiny_models
from tests.workflows.test_captioners import captioner

CAPTIONS = ("a red star", "the blue ring above a map", "one green square on the left")
SMALL = ("source.num_samples=12", "shard_size=5", "images.sizes_px=[32]", "store.dtype=float32", "keep_originals=true")
SCORES = "stages=[{kind: clip_score}]"


class Words(CaptionServer):
    """Captions of words that the tokenizer knows; every fourth image is refused."""

    def caption(self, asked: Asked) -> str:
        return CAPTIONS[int(asked.number, 16) % len(CAPTIONS)]

    def fault_of(self, asked: Asked) -> str | None:
        is_sample = asked.prompt == "Describe it."
        return "refused" if is_sample and int(asked.number, 16) % 4 == 0 else None


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tiny_models.clip, tmp_path_factory.mktemp("models") / "clip")


def encoders(clip: Path, output: str = "projected", image: str = "projected") -> tuple[str, str]:
    both = f"name: clip, kind: clip, model: {clip}, compute_dtype: float32"
    return f"encoders=[{{{both}, output: {output}}}]", f"image_encoders=[{{{both}, output: {image}, from_px: 32}}]"


@torch.inference_mode()
def reference(model: CLIPModel, clip: Path, pixels: np.ndarray, caption: str) -> float:
    """What CLIPModel says of one image and one caption."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    prepared = (np.asarray(Image.fromarray(pixels), np.float64) / 255 - mean) / std
    tokens = AutoTokenizer.from_pretrained(clip)([caption], return_tensors="pt")
    found = model(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        pixel_values=torch.from_numpy(prepared.transpose(2, 0, 1)).float()[None],
    )
    return float(found.logits_per_image / model.logit_scale.exp())


@pytest.mark.slow
def test_scores_are_those_of_clip_and_filter_and_a_set_that_is_added_has_its_own(clip: Path, tmp_path: Path) -> None:
    out, models = tmp_path / "run", encoders(clip)
    precompute(out, *SMALL, *models, SCORES)
    before = store_bytes(out)
    with serve(Words()) as server:
        precompute(out, *SMALL, *models, SCORES, captioner(server))
    after = store_bytes(out)
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {
        *("captions-long", "text-clip-long", "array-clip_score.long")
    }
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}
    assert verify_store(out / "store").ok
    store = Store.open(out / "store")
    assert store.arrays == ["clip_score.long", "clip_score.original"]
    model = CLIPModel.from_pretrained(clip, dtype=torch.float32).eval()
    longs: dict[str, float] = {}
    for sample in store:
        for name in ("original", "long"):
            found, captions = sample.arrays[f"clip_score.{name}"], sample.caption_sets[name]
            assert (found.dtype, found.shape) == (np.float32, (len(captions),))
            for score, caption in zip(found, captions, strict=True):
                assert score == pytest.approx(reference(model, clip, sample.images[32], caption), abs=1e-5)
        if len(sample.arrays["clip_score.long"]):
            longs[sample.key] = float(sample.arrays["clip_score.long"][0])
    assert 0 < len(longs) < len(store), "a sample without a caption has no score"
    limit = float(np.median(list(longs.values())))
    expected = {key for key, score in longs.items() if score > limit}
    assert 0 < len(expected) < len(longs)
    assert {sample.key for sample in store.where(f"clip_score.long > {limit!r}")} == expected
    assert {sample.key for sample in store.where("clip_score.long IS NULL")} == {s.key for s in store} - longs.keys()
    with pytest.raises(ConditionError, match=r"no column 'caption_tokens\.long'"):
        store.where("caption_tokens.long > 1")  # of one vector the tokens are not known
    table = SamplesTable(store, dict)
    assert table.wait(60)
    assert {row.key for row in rows(table, **{"array.clip_score.long_min": repr(limit + 1e-9)})} == expected
    ordered = [row.key for row in rows(table, sort="array.clip_score.long", order="descending")]
    assert ordered[: len(longs)] == sorted(longs, key=lambda key: (-longs[key], [s.key for s in store].index(key)))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("{kind: clip_score, captions: [brief]}", "stages.0.captions: there is no set 'brief'; there are original"),
        ("{kind: clip_score, encoder: t5}", "reads text-t5, which no earlier stage makes"),
        ("{kind: clip_score, captions: [original, original]}", "makes array-clip_score.original, as an earlier"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_is_made(
    clip: Path, tmp_path: Path, settings: str, says: str
) -> None:
    with pytest.raises(ConfigError) as error:
        precompute(tmp_path / "run", *SMALL, *encoders(clip), f"stages=[{settings}]")
    assert says in str(error.value)
    assert not (tmp_path / "run" / "store").exists()


def test_encoders_that_share_no_space_are_refused(clip: Path, tmp_path: Path) -> None:
    other = tiny_models.write(tiny_models.clip, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, other / "model.safetensors")
    for text, image, says in (
        (encoders(clip, output="pooled"), encoders(clip), "text-clip has the output 'pooled'"),
        (encoders(clip), encoders(clip, image="pooled"), "image-embed-clip has the output 'pooled'"),
        (encoders(clip), encoders(other), "text-clip is by clip and image-embed-clip by other; give one CLIP"),
    ):
        with pytest.raises(ConfigError) as error:
            precompute(tmp_path / "run", *SMALL, text[0], image[1], SCORES)
        assert says in str(error.value)
