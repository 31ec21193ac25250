"""Who wrote the captions of a run: `inspect --key`, `browse`, `report` and `status`."""

import json
import re
from collections import Counter
from html import unescape
from pathlib import Path

import pytest

from imagen_core.store import Store, captions_group
from pipeline.fingerprint import digest
from stages.captioners.base import question_seed
from tests.caption_server import MODEL, Asked, CaptionServer, serve
from tests.commands import call
from tests.runs import precompute
from tests.stages.browse.clients import client
from tests.workflows.test_captioners import KEYS, SMALL, captioner

PROMPT = "Describe it. {width} px, alt text: {caption}"
PRICE = {"input": 1000, "output": 10_000}


def faulty() -> CaptionServer:
    """One image is refused at all attempts, and another at the first one."""
    seen: list[str] = []

    def fault(asked: Asked) -> str | None:
        if not asked.prompt.startswith("Describe it."):
            return None
        if asked.number not in seen:
            seen.append(asked.number)
        place, is_first = seen.index(asked.number), sum(e.number == asked.number for e in server.requests) == 1
        return "refused" if place == 0 or (place == 1 and is_first) else None

    server = CaptionServer(fault=fault)
    return server


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests must not change it but for its report."""
    out = tmp_path_factory.mktemp("captioned") / "run"
    with serve(faulty()) as server:
        settings = captioner(server, prompt=PROMPT, price_per_million=PRICE, max_in_flight=1, seed=3)
        precompute(out, *SMALL, settings)
    return out


def test_inspect_says_who_wrote_each_caption(run: Path) -> None:
    store = Store.open(run / "store")
    made_by = store.manifest.captions["long"].made_by
    attempts: Counter[int | None] = Counter()
    for sample in store:
        (found,) = json.loads(call("inspect", str(run), "--key", sample.key, "--json").out)["found"][:1]
        original, long = found["written_by"]["original"], found["written_by"]["long"]
        assert original == {
            "kind": "source",
            "source": "synthetic",
            "place": {},
            "captions": [{"text": text} for text in sample.captions],
        }
        assert (long["captioner"], long["kind"], long["model"]) == ("long", "openai", MODEL)
        assert long["prompt"] == f"Describe it. {sample.width} px, alt text: {sample.captions[0]}"
        assert (long["made_by"], long["fingerprint"]) == (made_by, digest(made_by))
        assert [caption["text"] for caption in long["captions"]] == sample.caption_sets["long"]
        for caption in long["captions"]:
            assert caption["finish_reason"] == "stop"
            assert caption["seed"] == question_seed(3, sample.key, caption["attempt"] - 1)
        attempts.update([caption["attempt"] for caption in long["captions"]] or [None])
    assert attempts == {1: KEYS - 2, 2: 1, None: 1}


def test_inspect_says_it_to_people_too(run: Path) -> None:
    store = Store.open(run / "store")
    fingerprint = digest(store.manifest.captions["long"].made_by)[:12]
    for sample in store:
        lines = call("inspect", str(run), "--key", sample.key).out.splitlines()
        assert "      from synthetic" in lines
        assert f"      by long: openai, model {MODEL}, fingerprint {fingerprint}" in lines
        assert f"      prompt {PROMPT.format(width=sample.width, caption=sample.captions[0])!r}" in lines
        for caption in sample.caption_sets["long"]:
            at = lines.index(f"  caption of long  {caption!r}")
            seed = question_seed(3, sample.key, 0)
            assert re.fullmatch(r"      attempt [12], seed \d+, finish reason stop", lines[at + 1])
            assert (f"attempt 1, seed {seed}," in lines[at + 1]) == ("attempt 1" in lines[at + 1])
        assert ("  no caption of long" in lines) == (not sample.caption_sets["long"])


def test_a_store_without_its_run_knows_who_wrote_what_a_model_wrote(run: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").symlink_to(run / "store")
    key = Store.open(run / "store")[4].key
    (found,) = json.loads(call("inspect", str(tmp_path / "alone"), "--key", key, "--json").out)["found"]
    assert found["written_by"]["long"]["model"] == MODEL
    assert found["written_by"]["original"]["kind"] == "source"
    assert "source" not in found["written_by"]["original"]


def test_browse_has_all_sets_side_by_side_with_who_wrote_them(run: Path) -> None:
    store = Store.open(run / "store")
    browser = client(run)
    for number, sample in enumerate(store):
        position, row = store.locate(number)
        page = unescape(browser.get(f"/p/2/sample/{position}/{row}").text)
        sides = page[page.index('<div class="sides">') : page.index("<h2>Origin</h2>")]
        assert re.findall(r'<h3 class="kind"><bdi>(\w+)</bdi></h3>', sides) == ["original", "long"]
        texts = re.findall(r'<p class="text" dir="auto">(.*?)</p>', sides, re.DOTALL)
        prompt = PROMPT.format(width=sample.width, caption=sample.captions[0])
        assert texts == [*sample.captions, *sample.caption_sets["long"], prompt]
        assert f"by long: openai, model {MODEL}, fingerprint" in sides
        assert ("The sample has no caption of this set." in sides) == (not sample.caption_sets["long"])
        assert sides.count("finish reason stop") == len(sample.caption_sets["long"])


def test_browse_searches_and_filters_by_what_a_model_wrote(run: Path) -> None:
    store = Store.open(run / "store")
    written = {sample.key: sample.caption_sets["long"] for sample in store}
    key, (caption,) = next((key, captions) for key, captions in written.items() if captions)
    browser = client(run)
    page = browser.get("/p/2/", params={"q": caption[:30]}).text
    assert re.findall(r'<span class="caption" dir="auto">(.*?)</span>', page) == [caption]
    assert "in long" in page
    page = browser.get("/p/2/", params={"captions": "original", "q": caption[:30]}).text
    assert re.findall(r'<span class="caption" dir="auto">(.*?)</span>', page) == []
    longer = browser.get("/p/2/", params={"characters/long_min": 10**6}).text
    assert "/sample/" not in longer
    some = browser.get("/p/2/", params={"characters/long_min": 1}).text
    assert len(re.findall(r'href="[^"]*/sample/', some)) == KEYS - 1
    assert key


def test_the_report_has_a_section_for_each_captioner(run: Path) -> None:
    report = json.loads(call("report", str(run), "--json").out)
    (section,) = report["captioners"]
    made_by = Store.open(run / "store").manifest.captions["long"].made_by
    assert [section[name] for name in ("name", "kind", "model", "prompt")] == ["long", "openai", MODEL, PROMPT]
    assert section["fingerprint"] == digest(made_by)
    counts = section["counts"]
    requests = KEYS + 2
    assert (counts["captions"], counts["samples_without"]) == (KEYS - 1, 1)
    assert (counts["requests"], counts["tokens_in"]) == (requests, 100 * requests)
    assert section["cost"] == pytest.approx((counts["tokens_in"] * 1000 + counts["tokens_out"] * 10_000) / 1e6)
    assert section["attempts"] == {
        "captions": {"1": KEYS - 2, "2": 1},
        "without": {"2": 1},
        "all_shards": True,
    }
    assert section["reasons"] == {"refused": 1}
    page = unescape(Path(report["report"]).read_text())
    part = page[page.index("<h2>Captioner") : page.index("<h2>Throughput")]
    assert PROMPT in part
    assert f"{counts['tokens_out']:,}" in part
    assert "refused" in part
    rows = re.findall(r'<td dir="auto">(.*?)</td>\s*<td dir="auto">(.*?)</td>', part)
    captions = {(" / ".join(s.captions), *s.caption_sets["long"]) for s in Store.open(run / "store")}
    assert len(rows) == 6
    assert set(rows) <= captions
    assert all(address.startswith("data:") for address in re.findall(r'(?:src|href)="([^"]*)"', part))


def test_status_has_the_requests_and_tokens(run: Path) -> None:
    found = json.loads(call("status", str(run), "--json").out)["groups"][captions_group("long")]
    assert (found["rows"], found["drops"]) == (KEYS, {"refused": 1})
    assert found["counters"]["requests"] == KEYS + 2
    numbers = [KEYS + 2, *(f"{found['counters'][name]:,.0f}" for name in ("tokens_in", "tokens_out"))]
    shown = [line.split() for line in call("status", str(run)).out.splitlines()]
    assert ["group", "requests", "tokens_in", "tokens_out"] in shown
    assert ["captions-long", *map(str, numbers)] in shown
