"""What changes between two runs of one folder is noticed, refused or rebuilt; the store never mixes."""

import json
import shutil
from pathlib import Path

import pytest

from imagen_core.store import Store, verify_store
from pipeline.errors import ConfigError, MachineError, StaleOutputError
from stages.encoders.tiny import write_tiny_model
from tests.commands import call
from tests.image_server import body, serve
from tests.runs import precompute, store_bytes
from tests.stages.precompute.test_resize import png


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for place in range(8):
        (folder / f"{place}.png").write_bytes(png(40, 10 * (place + 1)))
        (folder / f"{place}.txt").write_text(f"image {place}")
    return folder


def arguments(images: Path, *more: str) -> list[str]:
    return ["source.kind=folder", f"source.path={images}", "images.sizes_px=[16]", "shard_size=2", *more]


def test_another_shard_size_is_refused_before_anything_is_written_and_leaves_no_old_shards_on_restart(
    images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    precompute(out, *arguments(images))
    config = (out / "config.yaml").read_bytes()
    with pytest.raises(StaleOutputError, match="shard_size changed"):
        precompute(out, *arguments(images, "shard_size=4"))
    assert (out / "config.yaml").read_bytes() == config
    summary = precompute(out, *arguments(images, "shard_size=4"), restart=True)
    assert summary["num_samples"] == 8
    precompute(tmp_path / "fresh", *arguments(images, "shard_size=4"))
    assert store_bytes(out) == store_bytes(tmp_path / "fresh")


def test_rows_taken_away_from_the_source_are_refused_and_removed_on_restart(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    precompute(out, *arguments(images))
    for place in range(4, 8):
        (images / f"{place}.png").unlink()
    with pytest.raises(StaleOutputError, match=r"made from:\n  4.png: gone\n  .*\n  .*\n  and 1 more\n"):
        precompute(out, *arguments(images))
    assert precompute(out, *arguments(images), restart=True)["num_samples"] == 4
    assert len(Store.open(out / "store")) == 4
    assert verify_store(out / "store").ok


def test_an_edited_caption_is_noticed(images: Path, tmp_path: Path) -> None:
    precompute(tmp_path / "run", *arguments(images))
    (images / "5.txt").write_text("image S")
    with pytest.raises(StaleOutputError, match="shard 00002 of samples was made from other input rows"):
        precompute(tmp_path / "run", *arguments(images))


@pytest.mark.slow
def test_an_encoder_no_longer_configured_does_not_outlive_the_captions_it_encoded(
    images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    both = "encoders=[{name: a, model: tiny-random-t5}, {name: b, model: tiny-random-t5, max_tokens: 5}]"
    precompute(out, *arguments(images, both))
    precompute(out, *arguments(images, "encoders=[{name: a, model: tiny-random-t5}]"))
    assert Store.open(out / "store").encoders == ["a", "b"], "it stays while it fits"
    (images / "5.txt").write_text("another caption")
    precompute(out, *arguments(images, "encoders=[{name: a, model: tiny-random-t5}]"), restart=True)
    assert Store.open(out / "store").encoders == ["a"]
    precompute(out, *arguments(images, both))
    store = Store.open(out / "store")
    assert store.encoders == ["a", "b"]
    precompute(tmp_path / "fresh", *arguments(images, both))
    assert store_bytes(out) == store_bytes(tmp_path / "fresh")


def test_originals_fetched_for_an_added_size_are_not_taken_for_all_of_them(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (images / "3.png").write_bytes(png(10, 99))  # too small
    precompute(out, *arguments(images))
    precompute(out, *arguments(images, "images.sizes_px=[16,32]", "keep_originals=true"))
    (out / "store" / "samples" / "00001.parquet").unlink()
    summary = precompute(out, *arguments(images, "images.sizes_px=[16,32]", "keep_originals=true"))
    assert summary["tally"]["groups"]["samples"]["drops"] == {"too_small": 1}
    assert summary["num_samples"] == 7


def test_the_manifest_is_gone_while_the_files_it_lists_are_replaced(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    precompute(out, *arguments(images))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stages.precompute.resize.ResizeStage.process", killed)
        with pytest.raises(KeyboardInterrupt):
            precompute(out, *arguments(images, "images.filter=box"), restart=True)
    assert not (out / "store" / "manifest.json").exists()
    assert json.loads(call("status", str(out), "--json").out)["outcome"] is None
    precompute(out, *arguments(images, "images.filter=box"))
    assert verify_store(out / "store").ok


def test_a_model_exchanged_during_the_run_is_refused(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    write_tiny_model(model)
    encoder = f"encoders=[{{name: t5, model: {model}}}]"
    fetch = "stages.precompute.fetch.FetchStage.process"
    from stages.precompute.fetch import FetchStage

    honest = FetchStage.process

    def exchange(self: FetchStage, task: object) -> None:
        weights = bytearray((model / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (model / "model.safetensors").write_bytes(weights)
        honest(self, task)  # type: ignore[arg-type]

    monkeypatch.setattr(fetch, exchange)
    with pytest.raises(Exception, match="weights_sha256") as caught:
        precompute(tmp_path / "run", *arguments(images, encoder))
    assert caught.value.exit_code == MachineError.exit_code  # type: ignore[attr-defined]


def test_tars_that_appear_during_a_run_do_not_change_what_is_read(tmp_path: Path) -> None:
    import io
    import tarfile

    from stages.precompute.fetch import fetch_originals
    from stages.sources.base import Original
    from stages.sources.tars import WebdatasetConfig

    def make(name: str, level: int) -> None:
        with tarfile.open(tmp_path / name, "w") as archive:
            for member, data in (("x.png", png(20, level)), ("x.txt", f"level {level}".encode())):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))

    make("b.tar", 50)
    source = WebdatasetConfig(path=str(tmp_path)).build()
    shard = next(source.shards(10))
    make("a.tar", 90)
    read: list[Original] = []
    fetch_originals(source, shard, None, tmp_path, read.append)
    assert [(o.key, o.captions) for o in read] == [("b/x", ("level 50",))]


def test_a_retry_of_a_changed_source_or_an_unknown_reason_changes_nothing(images: Path, tmp_path: Path) -> None:
    from pipeline.config import load_config
    from pipeline.options import RunOptions
    from workflows.precompute import Precompute, PrecomputeConfig

    (images / "3.png").write_bytes(png(10, 99))
    out = tmp_path / "run"
    precompute(out, *arguments(images))

    def retry(reason: str) -> None:
        workflow = Precompute(load_config(PrecomputeConfig, None, arguments(images)))
        workflow.run(out, RunOptions("inline", retry_dropped=(reason,), quiet=True))

    with pytest.raises(ConfigError, match="available reasons: too_small"):
        retry("http_404")
    (images / "2.txt").write_text("changed")
    with pytest.raises(StaleOutputError):
        retry("too_small")
    assert not (out / "retries").exists()


def test_a_shard_rebuilt_after_a_retry_round_keeps_each_sample_once(images: Path, tmp_path: Path) -> None:
    from pipeline.config import load_config
    from pipeline.options import RunOptions
    from workflows.precompute import Precompute, PrecomputeConfig

    (tmp_path / "elsewhere").mkdir()
    shutil.move(images / "3.txt", tmp_path / "elsewhere" / "3.txt")
    (images / "3.png").write_bytes(png(10, 99))
    out = tmp_path / "run"
    options = arguments(images)
    (images / "3.txt").write_text("image 3")
    precompute(out, *options)
    (images / "3.png").write_bytes(png(40, 40)[: len(png(10, 99))].ljust(len(png(10, 99)), b"\0"))
    workflow = Precompute(load_config(PrecomputeConfig, None, options))
    workflow.run(out, RunOptions("inline", retry_dropped=("all",), quiet=True))
    first = precompute(out, *options)
    (out / "store" / "samples" / "00001.parquet").unlink()
    again = precompute(out, *options)
    assert (again["num_samples"], again["tally"]["input_rows"]) == (first["num_samples"], 8)
    assert again["tally"]["groups"]["samples"]["drops"] == first["tally"]["groups"]["samples"]["drops"]
    keys = [sample.key for sample in Store.open(out / "store")]
    assert len(keys) == len(set(keys)) == 7


def test_a_run_goes_on_with_its_own_configuration_and_is_added_to(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["run", "precompute", "--out", str(out), "--executor", "inline", "--quiet"]
    first = call(*command, *arguments(images, "images.filter=lanczos"))
    assert (first.code, first.err) == (0, "")
    config = (out / "config.yaml").read_bytes()
    again = call(*command)
    assert (again.code, again.err) == (0, f"configuration: {out}/config.yaml\n")
    assert "8 of 8 samples in 4 shards, 4 already finished" in again.out
    assert (out / "config.yaml").read_bytes() == config
    before = store_bytes(out)
    added = call(*command, "encoders+=[{name: b, kind: t5, model: tiny-random-t5, compute_dtype: float32}]")
    assert (added.code, added.err) == (0, again.err), added.err
    assert set(Store.open(out / "store").encoders) == {"t5", "b"}
    unchanged = {name: data for name, data in store_bytes(out).items() if name in before and name != "manifest.json"}
    assert unchanged == {name: data for name, data in before.items() if name != "manifest.json"}
    other = call("run", "train", "--out", str(out))
    assert (other.code, other.err) == (
        2,
        f"error: --out {out}: is a run of precompute; use pipeline run precompute\n",
    )


def test_a_changed_download_setting_tells_which_option_tries_earlier_drops_again(tmp_path: Path) -> None:
    with serve({"/small.png": body(png(16, 1)), "/large.png": body(png(400, 2))}) as server:
        rows = [{"url": server.url(f"/{name}.png"), "caption": name} for name in ("small", "large")]
        (tmp_path / "urls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["run", "precompute", "--out", str(tmp_path / "run"), "--executor", "inline", "--quiet"]
        command += [
            "source.kind=urls",
            f"source.path={tmp_path / 'urls.jsonl'}",
            "encoders=[]",
            "images.sizes_px=[16]",
        ]
        command += ["source.download.allow_private_addresses=true"]
        first = call(*command, "source.download.max_bytes=200")
        assert (first.code, "finished: 1 of 2" in first.out) == (0, True), first.err
        shown = call("inspect", str(tmp_path / "run"), "--url", server.url("/large.png"))
        assert (shown.code, shown.out.startswith("dropped from samples of shard 00000, row 1: too_large")) == (0, True)
        assert call("inspect", str(tmp_path / "run"), "--url", server.url("/other.png")).code == 1
        report = json.loads(call("report", str(tmp_path / "run"), "--json").out)
        [drop] = report["dropped_rows"]
        assert (drop["key"], drop["reason"], drop["url"]) == ("000000001", "too_large", server.url("/large.png"))
        assert drop["captions"] == ["large"]
        assert server.url("/large.png") in Path(report["report"]).read_text()
        again = call(*command, "source.download.max_bytes=100000")
        assert "source.download.max_bytes: 200 -> 100000" in again.out
        assert "finished shards keep their drops (too_large 1); --retry-dropped too_large tries them" in again.out
        unchanged = call(*command, "source.download.max_bytes=100000")
        assert "finished shards keep their drops" not in unchanged.out
        assert (
            f"dropped 1 row; pipeline run precompute --out {tmp_path / 'run'} --retry-dropped too_large"
            in unchanged.out
        )
        assert "finished: 2 of 2" in call(*command, "--retry-dropped", "too_large").out
