"""The pages of trainings, samplings and evaluations, without a browser."""

import html
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from imagen_core.train.logs import read_metrics
from pipeline.storage.open import open_storage
from stages.evaluation.report import write_report
from tests.object_store import object_store
from tests.stages.browse.clients import client, statuses
from tests.stages.browse.training.trainings import lines, sampling, training

SCRIPT = "<script>alert(1)</script>"


def test_a_training_has_its_curves_grids_and_newest_values(tmp_path: Path) -> None:
    metrics = lines(range(1, 101), loss=0.0, lr=0.5, grad_norm=1.0, images_per_s=2.0, loader_wait=0.0) + lines(
        [100], validation_loss=3.0
    )
    page = client(training(tmp_path / "a", metrics, grids=[50, 100])).get("/p/1/").text
    titles = re.findall(r"<figcaption>(.*?) <span", page)
    assert titles == [
        "Training loss",
        "Validation loss",
        "Learning rate",
        "Gradient norm",
        "Images per second",
        "Waiting for the loader, fraction of the time",
    ]
    assert "validation_loss <b>103</b>" in page
    assert "data-steps='[50, 100]'" in page
    assert 'src="/p/1/grids/100.png"' in page
    assert "seed: 0" in client(tmp_path / "a").get("/p/1/settings").text


def test_the_fragment_follows_the_file(tmp_path: Path) -> None:
    root = training(tmp_path / "a", lines([1], loss=0.0))
    pages = client(root)
    assert "loss <b>1</b>" in pages.get("/p/1/curves").text
    with (root / "metrics.jsonl").open("a") as file:
        file.write(lines([2], loss=0.0))
    training(root, (root / "metrics.jsonl").read_text(), grids=[2])
    fragment = pages.get("/p/1/curves").text
    assert "loss <b>2</b>" in fragment
    assert "data-steps='[2]'" in fragment
    assert "<html" not in fragment


def test_a_view_is_in_the_address(tmp_path: Path) -> None:
    pages = client(training(tmp_path / "a", lines(range(1, 101), loss=-10.0)))
    page = pages.get("/p/1/?smoothing=0.9&log=1&first=5&last=50").text
    assert 'data-live="/p/1/curves?smoothing=0.9&amp;log=1&amp;first=5&amp;last=50"' in page
    assert "6 values of 0 and less are not drawn" in page
    assert 'class="curve colour-0 faint"' in page
    assert 'class="curve colour-0 faint"' not in pages.get("/p/1/?smoothing=7&log=x&first=-1&last=1e9").text


def test_several_trainings_lie_over_each_other_with_what_differs(tmp_path: Path) -> None:
    for number, name in enumerate(("a/base", "b/base", "c/other")):
        training(tmp_path / name, lines(range(1, 4), loss=number), f"seed: {number}\nsteps: 9\n")
    pages = client(*(tmp_path / name for name in ("a/base", "b/base", "c/other")))
    page = pages.get("/compare?place=1&place=2&place=3&place=1").text
    assert re.findall(r"<bdi>([^<]*)</bdi> <span class=\"dim\">(\d+)", page) == [
        ("a/base", "3"),
        ("b/base", "4"),
        ("other", "5"),
    ]
    assert [*re.findall(r"<code>([^<]*)</code>", page)] == ["seed", "0", "1", "2"]
    assert "b/base" in pages.get("/compare/curves?place=1&place=2").text
    other = pages.get("/p/1/settings?other=2").text
    assert re.findall(r"<td><code>(.*?)</code></td>", other) == ["seed", "0", "1"]


def test_the_index_leads_to_the_comparison_of_trainings(tmp_path: Path) -> None:
    roots = [training(tmp_path / name, lines([7], loss=0.0)) for name in ("a", "b")]
    page = client(*roots).get("/").text
    assert page.count("step 7") == 2
    assert 'href="/compare"' in page
    assert 'href="/compare"' not in client(roots[0]).get("/").text


def test_only_trainings_are_compared_and_not_too_many(tmp_path: Path) -> None:
    roots = [training(tmp_path / f"t{number}", "") for number in range(9)]
    pages = client(*roots, sampling(tmp_path / "s", ["a"]))
    everything = "&".join(f"place={number}" for number in range(1, 10))
    assert statuses(
        pages, ["/compare", "/compare?place=10", "/compare?place=99", "/compare?place=x", f"/compare?{everything}"]
    ) == [200, 404, 404, 404, 400]


def test_grids_and_images_are_the_bytes_of_their_files_and_cached_by_version(tmp_path: Path) -> None:
    pages = client(training(tmp_path / "t", "", grids=[7]), sampling(tmp_path / "s", ["a", "b"]))
    for address, path in (
        ("/p/1/grids/7.png", "t/grids/step-00000007.png"),
        ("/p/2/images/0/8/1.png", "s/images-8/00001.png"),
    ):
        answer = pages.get(address)
        assert answer.content == (tmp_path / path).read_bytes()
        assert answer.headers["content-type"] == "image/png"
        again = {"If-None-Match": answer.headers["etag"]}
        assert pages.get(address, headers=again).status_code == 304
        Image.new("RGB", (5, 5)).save(tmp_path / path)
        assert pages.get(address, headers=again).content == (tmp_path / path).read_bytes()


def test_what_is_missing_or_damaged_is_a_line_in_its_place(tmp_path: Path) -> None:
    root = sampling(tmp_path / "s", ["a", "b", "c"])
    (root / "images-8" / "00000.png").unlink()
    whole = (root / "images-8" / "00001.png").read_bytes()
    (root / "images-8" / "00001.png").write_bytes(whole[:-5])
    (root / "images-8" / "00002.png").write_bytes(b"<html>")
    pages = client(root)
    answers = [pages.get(f"/p/1/images/0/8/{index}.png") for index in range(3)]
    assert [answer.status_code for answer in answers] == [404, 422, 422]
    assert answers[1].text == f"images-8/00001.png: is no PNG, or was truncated ({len(whole) - 5:,} bytes)"
    assert all(answer.headers["content-type"].startswith("text/plain") for answer in answers)
    assert pages.get("/p/1/").status_code == 200


@pytest.mark.parametrize(
    "address",
    [
        "/p/1/images/0/8/99.png",
        "/p/1/images/0/9/0.png",
        "/p/1/images/1/8/0.png",
        "/p/1/images/0/8/..%2F..%2Fplan.json",
        "/p/1/images/0/8/-1.png",
        "/p/1/images/../plan.json",
        "/p/1/images/0/8/" + "9" * 500 + ".png",
    ],
)
def test_images_are_found_by_number_alone(tmp_path: Path, address: str) -> None:
    assert client(sampling(tmp_path, ["a"])).get(address).status_code == 404


def test_everything_that_was_written_is_shown_as_text(tmp_path: Path) -> None:
    metrics = f'{{"step": 1, "{SCRIPT}": 1.0, "loss": 1.0}}\n{{"step": 2, "{SCRIPT}": 2.0}}\n'
    rows = [{"name": SCRIPT, "images": 1, "clip_score": 1.0, "warning": SCRIPT}]
    write_report(
        sampling(tmp_path / "e", [SCRIPT, "‮" + SCRIPT * 1000], transcription=SCRIPT),
        {"features_model": SCRIPT, "clip_model": SCRIPT, "rows": rows},
    )
    (tmp_path / "e" / "plan.json").write_text('{"workflow": "evaluate"}')
    pages = client(training(tmp_path / SCRIPT.replace("/", "_"), metrics, f"seed: '{SCRIPT}'\n"), tmp_path / "e")
    for address in ("/p/1/", "/p/1/settings", "/compare?place=1", "/p/2/", "/p/2/?q=" + SCRIPT):
        page = pages.get(address).text
        assert "<script>" not in page
        assert "alert(1)" in page
    assert html.escape(SCRIPT * 1000) in pages.get("/p/2/").text


def test_prompts_are_shown_in_pages_with_all_sizes_next_to_each_other(tmp_path: Path) -> None:
    pages = client(sampling(tmp_path, [f"prompt {number:02d}" for number in range(45)], sizes=(4, 8)))
    first, last = pages.get("/p/1/").text, pages.get("/p/1/?page=3").text
    assert re.findall(r"prompt \d\d", first) == [f"prompt {number:02d}" for number in range(20)]
    assert re.findall(r"prompt \d\d", last) == [f"prompt {number:02d}" for number in range(40, 45)]
    assert re.findall(r'src="(/p/1/images[^"]*/0.png)"', first) == ["/p/1/images/0/4/0.png", "/p/1/images/0/8/0.png"]
    assert re.findall(r"prompt \d\d", pages.get("/p/1/?q=PROMPT+3&size=8").text) == [
        f"prompt {number}" for number in range(30, 40)
    ]
    assert (
        statuses(pages, ["/p/1/?page=999", "/p/1/?page=x&size=x", "/p/1/?page=-1", "/p/1/?page=" + "9" * 5000])
        == [200] * 4
    )


def test_a_sweep_shows_each_prompt_at_all_weights_and_its_results(tmp_path: Path) -> None:
    rows = []
    for weight in (1.0, 4.0):
        sampling(tmp_path / f"guidance-{weight:g}", ["a cat"])
        rows.append(
            {
                "name": f"guidance-{weight:g}",
                "guidance": weight,
                "images": 1,
                "frechet_distance": 9 / weight,
                "clip_score": weight,
            }
        )
    write_report(tmp_path, {"features_model": None, "clip_model": None, "rows": rows})
    page = client(tmp_path).get("/p/1/").text
    assert re.findall(r'src="(/p/1/images[^"]*)"', page) == ["/p/1/images/0/8/0.png", "/p/1/images/1/8/0.png"]
    assert re.findall(r"<td>(guidance-\d)</td>", page) == ["guidance-1", "guidance-4"]
    assert page.count("<circle") == 6  # three plots of two points


def test_a_damaged_part_leaves_the_rest_of_the_page(tmp_path: Path) -> None:
    root = sampling(tmp_path / "e", ["a cat"])
    (root / "plan.json").write_text('{"workflow": "evaluate"}')
    (root / "results.json").write_text("{")
    broken = training(tmp_path / "t", "", config="a: [", grids=[1])
    os.rename(broken / "metrics.jsonl", broken / "m")
    (broken / "metrics.jsonl").mkdir()
    pages = client(root, broken, training(tmp_path / "u", lines([1], loss=0.0)))
    assert "results.json" in pages.get("/p/1/").text
    assert "a cat" in pages.get("/p/1/").text
    page = pages.get("/p/2/").text
    assert "is a directory" in page.lower()
    assert "grids/1.png" in page
    assert "not valid YAML" in pages.get("/compare?place=2&place=3").text
    assert "a: [" in pages.get("/p/2/settings").text


def test_pages_ask_for_nothing_but_this_server_and_have_no_inline_code(tmp_path: Path) -> None:
    pages = client(training(tmp_path / "t", lines(range(9), loss=0.0), grids=[1]), sampling(tmp_path / "s", ["a"]))
    for address in ("/p/1/", "/p/1/settings", "/compare?place=1", "/p/2/"):
        page = pages.get(address).text
        assert re.findall(r'(?:src|href)="(?:https?:|//)[^"]*', page) == []
        assert re.findall(r"<[^>]*\s(?:style|on\w+)=", page) == []
        assert re.findall(r"<script(?![^>]*src=)", page) == []


@pytest.mark.slow
def test_folders_on_an_object_store_have_the_same_pages(tmp_path: Path) -> None:
    root = training(tmp_path / "t", lines(range(1, 50), loss=0.0), grids=[7])
    sweep = tmp_path / "e"
    for weight in ("1", "2"):
        sampling(sweep / f"guidance-{weight}", ["a cat"])
    (sweep / "plan.json").write_text('{"workflow": "evaluate"}')
    with object_store() as store:
        for path in (path for path in tmp_path.rglob("*") if path.is_file()):
            open_storage(store.url).write(path.relative_to(tmp_path).as_posix(), path.read_bytes())
        near, far = client(root, sweep), client(f"{store.url}/t", f"{store.url}/e")
        for address in ("/p/1/curves?smoothing=0.6", "/p/1/grids/7.png", "/p/2/images/1/8/0.png"):
            assert far.get(address).content == near.get(address).content
        assert "a cat" in far.get("/p/2/").text
        assert "seed: 0" in far.get("/p/1/settings").text
        store.requests.clear()
        assert far.get("/p/1/curves").status_code == 200
        assert far.get("/p/1/curves").status_code == 200
        assert store.requests.bytes_sent("t/metrics.jsonl") == 0  # nothing new: nothing is read again


@pytest.mark.slow
def test_real_trainings_and_their_configurations_are_shown(cascade: Path) -> None:
    pages = client(cascade / "base", cascade / "sr")
    for number, name in ((1, "base"), (2, "sr")):
        page = pages.get(f"/p/{number}/").text
        rows = read_metrics(cascade / name / "metrics.jsonl")
        newest = {key: value for row in rows for key, value in row.items()}
        assert f"loss <b>{newest['loss']:.4g}</b>" in page
        assert f"at step {newest['step']}</span>" in page
        assert 'class="state">finished<' in page
        assert "Learning rate" in page
    page = pages.get("/compare?place=1&place=2").text
    differing = re.findall(r"<td><code>([\w.]*)</code></td>", page)
    assert "denoiser.unet.image_size_px" in differing
    assert "seed" not in differing
