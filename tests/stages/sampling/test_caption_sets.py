"""Sampling of caption sets: selections, shares, sizes, texts and times."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from imagen_core.store import Store
from pipeline.errors import ConfigError
from stages.sampling.caption_sets import FileCaptions
from tests.commands import Result, call, tree

PROMPTS = "prompts=[a small red circle,a large blue square on the right,a star,a green triangle,a ring]"


def sample(cascade: Path, out: Path, *more: str) -> Result:
    stages = [{"checkpoint": str(cascade / name), "sampling": {"num_steps": 2}} for name in ("base", "sr")]
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({"stages": stages, "device": "cpu"}))
    return call("run", "sample", "-c", str(path), "--out", str(out), "--quiet", "--json", *more)


def summary(result: Result) -> dict:
    assert result.code == 0, result.err
    return json.loads(result.out)["summary"]


def images(out: Path) -> dict[str, np.ndarray]:
    files = sorted((out / "images-32").glob("*.png"))
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in files}


def prompts(out: Path) -> list[tuple[str, int, str | None]]:
    record = json.loads((out / "images.json").read_text())
    return [(p["prompt"], p["seed"], p["key"]) for p in record["images"]]


@pytest.mark.slow
def test_a_selection_of_captions_is_seeded_without_replacement_and_starts_like_a_larger_one(
    cascade: Path, tmp_path: Path
) -> None:
    captions = ["captions.kind=store", f"captions.path={cascade}/run", "output.size_px=16"]
    for name, more in {"all": [], "ten": ["captions.num_captions=10"], "four": ["captions.num_captions=4"],
                       "other": ["captions.num_captions=10", "captions.seed=1"]}.items():  # fmt: skip
        assert sample(cascade, tmp_path / name, *captions, *more).code == 0
    everything, ten, four, other = (prompts(tmp_path / name) for name in ("all", "ten", "four", "other"))
    store = Store.open(cascade / "run/store")
    assert [key for _, _, key in everything] == [sample.key for sample in store]
    texts = {sample.key: sample.captions for sample in store}
    assert all(text in texts[str(key)] for text, _, key in [*everything, *ten, *other])
    assert len({key for _, _, key in ten}) == 10
    assert four == ten[:4]
    assert [seed for _, seed, _ in ten] == list(range(10)), "the seed of an image is its index"
    assert {key for _, _, key in other} != {key for _, _, key in ten}
    refused = sample(cascade, tmp_path / "many", *captions, "captions.num_captions=99")
    assert refused.code == 2
    assert "captions.num_captions" in refused.err
    assert "99 requested, but there are 23" in refused.err


@pytest.mark.slow
def test_captions_of_a_store_need_no_encoder_and_give_the_same_images(cascade: Path, tmp_path: Path) -> None:
    captions = ["captions.kind=store", f"captions.path={cascade}/run/store", "captions.num_captions=3"]
    stored = sample(cascade, tmp_path / "stored", *captions, "encoder_model=absent/model")
    assert summary(stored)["embeddings"] == "store, text-t5"
    lines = "\n".join(text for text, _, _ in prompts(tmp_path / "stored"))
    (tmp_path / "captions.txt").write_text(lines + "\n\n")
    encoded = sample(cascade, tmp_path / "encoded", "captions.kind=file", f"captions.path={tmp_path}/captions.txt")
    assert summary(encoded)["embeddings"] == "encoder"
    a, b = images(tmp_path / "stored"), images(tmp_path / "encoded")
    assert len(a) == 3
    assert all(np.abs(a[name] - b[name]).max() <= 1 for name in a)


def test_a_captions_file_may_be_a_table(cascade: Path, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text('image,caption\n1,"a star, red"\n2,a ring\n')
    table = ["captions.kind=file", f"captions.path={tmp_path}/c.csv", "output.size_px=16"]
    assert sample(cascade, tmp_path / "s", *table).code == 0
    assert [text for text, _, _ in prompts(tmp_path / "s")] == ["a star, red", "a ring"]
    wrong = sample(cascade, tmp_path / "w", *table, "captions.caption_column=text")
    assert "captions.caption_column:" in wrong.err
    assert "it has: image, caption" in wrong.err
    absent = sample(cascade, tmp_path / "w", "captions.kind=file", f"captions.path={tmp_path}/absent.txt")
    assert absent.code == 2
    assert absent.err.startswith("error: captions.path: ")
    both = sample(cascade, tmp_path / "w", *table, "prompts=[a]")
    assert "give one of prompts, prompts_file and captions" in both.err


@pytest.mark.slow
def test_shares_add_up_to_all_images_in_one_folder_or_in_several(
    cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert summary(sample(cascade, tmp_path / "whole", PROMPTS))["missing"] == 0
    whole = images(tmp_path / "whole")
    assert len(whole) == 5
    first = summary(sample(cascade, tmp_path / "one", PROMPTS, "part={index: 0, count: 2}"))
    assert (first["images"], first["generated_now"], first["missing"]) == (5, 3, 2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert summary(sample(cascade, tmp_path / "one", PROMPTS))["generated_now"] == 2
    monkeypatch.undo()
    again = summary(sample(cascade, tmp_path / "one", PROMPTS))
    assert (again["generated_now"], again["missing"]) == (0, 0)
    for index in range(3):
        assert sample(cascade, tmp_path / f"part{index}", PROMPTS, f"part={{index: {index}, count: 3}}").code == 0
    parts = [images(tmp_path / f"part{index}") for index in range(3)]
    assert sum(map(len, parts)) == 5
    for united in (images(tmp_path / "one"), {name: p for part in parts for name, p in part.items()}):
        assert united.keys() == whole.keys()
        assert all(np.abs(united[name] - whole[name]).max() <= 1 for name in whole)
    wrong = sample(cascade, tmp_path / "w", PROMPTS, "part={index: 2, count: 2}")
    assert "index 2 of 2 parts: the last one is 1" in wrong.err


def test_shares_do_not_delete_what_others_generate(cascade: Path, tmp_path: Path) -> None:
    assert sample(cascade, tmp_path / "s", "prompts=[a star]").code == 0
    refused = sample(cascade, tmp_path / "s", "prompts=[a ring]", "part={index: 0, count: 2}", "--restart")
    assert refused.code == 2
    assert "images.00000.png.prompt: a star -> a ring" in refused.err
    assert "in one process, at first" in refused.err


def test_output_size_stops_early_and_loads_no_stage_behind(cascade: Path, tmp_path: Path) -> None:
    result = sample(cascade, tmp_path / "s", "prompts=[a star]", "output.size_px=16", "stages.1.checkpoint=absent")
    assert summary(result)["sizes_px"] == [16]
    assert [path.name for path in (tmp_path / "s").glob("images-*")] == ["images-16"]
    wrong = sample(cascade, tmp_path / "w", "prompts=[a star]", "output.size_px=64")
    assert "output.size_px: no stage generates 64 px; the stages generate [16, 32]" in wrong.err


def test_texts_next_to_images_sizes_to_write_and_seconds_of_each_stage(cascade: Path, tmp_path: Path) -> None:
    found = summary(
        sample(cascade, tmp_path / "s", "prompts=[a star,a ring]", "output.text=true", "output.all_sizes=false")
    )
    assert set(found["seconds_per_image"]) == {"16", "32"}
    assert all(seconds > 0 for seconds in found["seconds_per_image"].values())
    files = {name for name in tree(tmp_path / "s") if name.startswith("images-")}
    assert files == {f"images-32/0000{index}.{suffix}" for index in (0, 1) for suffix in ("png", "txt")}
    assert (tmp_path / "s/images-32/00001.txt").read_text() == "a ring\n"
    more = summary(sample(cascade, tmp_path / "s", "prompts=[a star,a ring]"))
    assert (more["generated_now"], more["sizes_px"]) == (2, [16, 32]), "a size written later is generated later"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_generates_about_the_same_image(cascade: Path, tmp_path: Path, precision: str) -> None:
    for name in ("float32", precision):
        assert sample(cascade, tmp_path / name, "prompts=[a star]", f"precision={name}").code == 0
    exact, half = images(tmp_path / "float32"), images(tmp_path / precision)
    assert 0 < np.abs(exact["00000.png"] - half["00000.png"]).mean() < 8


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"caption": "a"}\n{"caption": {"raw": "b"}}\n', "'caption' holds a struct, not text"),
        ('{"caption": "a"}\n{"caption":\n', "line 2 is not JSON"),
    ],
)
def test_a_file_with_a_caption_that_is_no_text_is_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "c.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=f"captions.path: .*c.jsonl: {says}"):
        FileCaptions(path=str(tmp_path / "c.jsonl")).captions()


def test_captions_of_a_file_may_be_nested_and_bytes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"c": pa.array([{"raw": b"a"}, {"raw": b"b"}, {"raw": None}])}), tmp_path / "c.parquet")
    found = FileCaptions(path=str(tmp_path / "c.parquet"), caption_column="c.raw").captions()
    assert [caption.text for caption in found] == ["a", "b"]
