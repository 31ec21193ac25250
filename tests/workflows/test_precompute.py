"""The main job: what a user finds in the store after `pipeline run precompute`."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagen_core.store import Store
from stages.sources.synthetic.scenes import encode_image, scene
from stages.sources.synthetic.source import dead_indices
from tests.commands import call
from tests.runs import SMALL, events, precompute, store_bytes


def pillow_resize(data: bytes, size_px: int) -> np.ndarray:
    """The reference: on white, centre square, Pillow's antialiased bicubic."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    square = image.crop((left, top, left + short, top + short))
    return np.asarray(square.resize((size_px, size_px), Image.Resampling.BICUBIC))


def max_difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_the_default_source_really_downloads_and_caches_every_scene(small_run: Path) -> None:
    store = Store.open(small_run / "store")
    dead = dead_indices(20, 1)
    assert dead == {2}
    assert [s.key for s in store] == [f"{i:09d}" for i in range(20) if i not in dead]
    for sample in store:
        original = scene(0, int(sample.key), split="train")
        assert sample.captions == list(original.captions)
        assert sample.url == f"synthetic://0/{sample.key}.png"
        for size in (16, 48):
            assert max_difference(sample.images[size], pillow_resize(encode_image(original), size)) <= 1
        for caption, embedding in zip(sample.captions, sample.text["t5"], strict=True):
            assert embedding.shape == (len(caption.split()) + 1, 64), "one token per word, and the end"
            assert embedding.dtype == np.float16


def test_the_dead_link_is_a_counted_drop_with_its_reason(small_run: Path) -> None:
    summary = json.loads((small_run / "summary.json").read_text())
    assert summary["num_samples"] == 19
    assert summary["tally"]["input_rows"] == 20
    assert summary["tally"]["groups"]["samples"]["drops"] == {"http_404": 1}
    drop = json.loads((small_run / "quarantine" / "samples" / "00000.jsonl").read_text())
    assert (drop["row"], drop["key"], drop["reason"]) == (2, "000000002", "http_404")


def test_the_same_command_again_recomputes_nothing(copy_of_small_run: Path) -> None:
    before, tasks = store_bytes(copy_of_small_run), len(events(copy_of_small_run))
    summary = precompute(copy_of_small_run, *SMALL)
    assert store_bytes(copy_of_small_run) == before
    assert [e["event"] for e in events(copy_of_small_run)[tasks:]] == ["run_started", "run_ended"]
    assert summary["tally"]["shards_skipped"] == 3


def test_hdf5_and_parquet_hold_identical_samples(small_run: Path, tmp_path: Path) -> None:
    precompute(tmp_path / "h5", *SMALL, "store.format=hdf5")
    parquet, hdf5 = Store.open(small_run / "store"), Store.open(tmp_path / "h5" / "store")
    assert len(parquet) == len(hdf5) == 19
    for a, b in zip(parquet, hdf5, strict=True):
        assert (a.key, a.captions, a.sha256) == (b.key, b.captions, b.sha256)
        assert all(np.array_equal(a.images[size], b.images[size]) for size in (16, 48))
        assert all(np.array_equal(x, y) for x, y in zip(a.text["t5"], b.text["t5"], strict=True))


def test_an_added_encoder_computes_only_its_own_group(copy_of_small_run: Path) -> None:
    before, tasks = store_bytes(copy_of_small_run), len(events(copy_of_small_run))
    short = "{name: short, model: tiny-random-t5, max_tokens: 4}"
    precompute(copy_of_small_run, *SMALL, f"encoders=[{{name: t5, model: tiny-random-t5}}, {short}]")
    after = store_bytes(copy_of_small_run)
    assert {n: b for n, b in after.items() if n in before and n != "manifest.json"} == {
        n: b for n, b in before.items() if n != "manifest.json"
    }
    assert {e["stage"] for e in events(copy_of_small_run)[tasks:] if e["event"] == "task"} == {"encode-short"}
    store = Store.open(copy_of_small_run / "store")
    assert store.encoders == ["short", "t5"]
    assert {e.shape[0] for s in store for e in s.text["short"]} == {4}
    summary = json.loads((copy_of_small_run / "summary.json").read_text())
    group = summary["tally"]["groups"]["text-short"]
    assert group["counters"]["captions_truncated"] == group["counters"]["captions_encoded"]


def test_an_added_size_computes_only_its_own_group_and_keeps_every_row(copy_of_small_run: Path) -> None:
    before = store_bytes(copy_of_small_run)
    precompute(copy_of_small_run, *SMALL[:2], "images.sizes_px=[16,32,48]")
    after = store_bytes(copy_of_small_run)
    added = sorted(set(after) - set(before))
    assert added == [f"images-32/0000{i}.parquet" for i in range(3)]
    assert all(after[name] == content for name, content in before.items() if name != "manifest.json")
    for sample in Store.open(copy_of_small_run / "store"):
        image = encode_image(scene(0, int(sample.key), split="train"))
        assert max_difference(sample.images[32], pillow_resize(image, 32)) <= 1


def test_a_changed_max_tokens_is_refused_with_a_diff_and_rebuilt_with_restart(copy_of_small_run: Path) -> None:
    before = store_bytes(copy_of_small_run)
    arguments = ["run", "precompute", "--out", str(copy_of_small_run), "--executor", "inline", *SMALL]
    refused = call(*arguments, "encoders.0.max_tokens=6")
    assert refused.code == 2
    assert "text-t5.fingerprint.max_tokens: 128 -> 6" in refused.err
    assert "--restart" in refused.err
    assert store_bytes(copy_of_small_run) == before
    assert call(*arguments, "encoders.0.max_tokens=6", "--restart").code == 0
    after = store_bytes(copy_of_small_run)
    assert {e.shape[0] for s in Store.open(copy_of_small_run / "store") for e in s.text["t5"]} == {6}
    assert all(after[n] == b for n, b in before.items() if n.startswith(("images-", "samples")))


def test_embeddings_take_their_natural_size_on_disk(small_run: Path) -> None:
    summary = json.loads((small_run / "summary.json").read_text())
    group = summary["tally"]["groups"]["text-t5"]
    tokens, captions = group["counters"]["tokens"], group["counters"]["captions_encoded"]
    assert group["counters"]["payload_bytes"] == tokens * 64 * 2
    assert group["bytes"] <= 1.02 * tokens * 64 * 2 + 64 * captions


def test_the_store_goes_from_files_to_batches_for_training(small_run: Path) -> None:
    loader = Store.open(small_run / "store").loader(batch_size=5, images=[16], text="t5", max_tokens=128, seed=0)
    keys = [key for batch in loader for key in batch["keys"]]
    assert sorted(keys) == [f"{i:09d}" for i in range(20) if i != 2]


def test_sources_of_the_same_images_make_the_same_pixels_and_embeddings(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "images").mkdir(parents=True)
    lines = ["file\tcaption"]
    for index in range(6):
        painted = scene(3, index)
        (folder / "images" / f"{index}.png").write_bytes(encode_image(painted))
        lines.append(f"{index}.png\t{painted.captions[0]}")
    (folder / "captions.tsv").write_text("\n".join(lines))
    (tmp_path / "loose").mkdir()
    for index in range(6):
        (tmp_path / "loose" / f"{index}.png").write_bytes((folder / "images" / f"{index}.png").read_bytes())
        (tmp_path / "loose" / f"{index}.txt").write_text(lines[index + 1].split("\t")[1] + "\n")
    for name, path in (("table", folder), ("text-files", tmp_path / "loose")):
        precompute(
            tmp_path / name, "source.kind=folder", f"source.path={path}", "images.sizes_px=[32]", "shard_size=4"
        )
    table, text_files = store_bytes(tmp_path / "table"), store_bytes(tmp_path / "text-files")
    assert table == text_files


def printed(*arguments: str) -> dict[str, Any]:
    """What a command prints with --json."""
    result = call(*arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_plan_status_inspect_and_report_say_what_is_there(copy_of_small_run: Path) -> None:
    out = str(copy_of_small_run)
    plan = printed("plan", "precompute", "--out", out, *SMALL)
    assert (plan["shards"], plan["input_rows"]) == (3, 20)
    assert plan["groups"]["text-t5"]["shards_done"] == 3
    fresh = printed("plan", "precompute", "--out", f"{out}-not-there", *SMALL)
    assert fresh["groups"]["images-48"] == {
        "shards_done": 0,
        "shards_to_do": 3,
        "bytes_done": 0,
        "bytes_to_do": 20 * 48 * 48 * 3,
    }
    assert not Path(f"{out}-not-there").exists(), "a plan writes nothing"
    status = printed("status", out)
    assert (status["outcome"], status["running"], status["groups"]["samples"]["rows"]) == ("finished", False, 19)
    inspected = printed("inspect", out)
    assert (inspected["num_samples"], inspected["image_sizes"], inspected["encoders"]) == (19, [16, 48], ["t5"])
    assert inspected["groups"]["text-t5"]["fingerprint"]["model"] == "tiny-random-t5"
    report = printed("report", out)
    page = Path(report["report"]).read_text()
    sample = Store.open(copy_of_small_run / "store")[0]
    assert sample.captions[0] in page
    assert page.count("data:image/png;base64,") == 2 * 19
    assert "<svg" in page
    assert "http_404" in page
    assert ".pair { display: flex; flex-wrap: wrap;" in page, "images of several sizes do not overlap"
    tasks = [event for event in events(copy_of_small_run) if event["event"] == "task"]
    assert max(task["setup_s"] for task in tasks) > 0
    for row in report["throughput"]:
        times = [task["seconds"] - task["setup_s"] for task in tasks if task["stage"] == row["stage"]]
        assert row["busy_s"] == pytest.approx(sum(times), abs=0.01), "the start of workers does not count"
    assert not any(f'{attribute}="http' in page for attribute in ("src", "href")), "self-contained"
    verified = printed("verify", out)
    assert (verified["ok"], verified["num_samples"]) == (True, 19)


def test_help_loads_no_heavy_module() -> None:
    code = (
        "import sys; from pipeline.cli import main as cli\n"
        "sys.argv = ['pipeline', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'transformers', 'pyarrow', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("package", ["ray", "transformers", "img2dataset"])
def test_the_model_library_does_not_load(package: str) -> None:
    code = f"import sys, imagen_core, imagen_core.store; print({package!r} in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_every_shipped_configuration_is_valid() -> None:
    from pipeline.cli.presets import list_presets
    from pipeline.config import load_config
    from pipeline.workflow import load_workflow

    presets = list_presets()
    assert {preset["name"] for preset in presets} >= {"demo", "urls-t5-xxl"}
    for preset in presets:
        load_config(load_workflow(preset["workflow"]).config_class, Path(preset["path"]))


def test_random_weights_are_named_by_plan_terminal_and_summary(tmp_path: Path) -> None:
    says = "encoder t5 has random weights (tiny-random-t5): its embeddings say nothing about the captions"
    settings = ["--out", str(tmp_path / "run"), "source.num_samples=4", "images.sizes_px=[16]", "--executor", "inline"]
    assert says in call("plan", "precompute", *settings).out
    result = call("run", "precompute", *settings)
    assert says in result.err
    assert says in result.out
    [notice] = json.loads((tmp_path / "run/summary.json").read_text())["notices"]
    assert notice == f"{says}; for real ones set encoders.0.model to a hub id or a folder"
    without = call("run", "precompute", *settings[:1], str(tmp_path / "images"), *settings[2:], "encoders=[]")
    assert "random weights" not in without.out + without.err
