"""`captioners` of `kind: openai`: captions by servers, from the originals to the store."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from imagen_core.store import Store, read_captions, verify_store
from pipeline.errors import ConfigError, MachineError, PipelineError, StaleOutputError, UnavailableError
from stages.captioners.base import question_seed
from tests.caption_server import MODEL, Asked, CaptionServer, caption_of, serve
from tests.runs import precompute, store_bytes

SMALL = ("source.num_samples=12", "shard_size=5", "images.sizes_px=[8]", "encoders=[]")
KEYS = 11
"""Samples: one link of the synthetic source is dead."""


def captioner(server: CaptionServer, **settings: Any) -> str:
    given = {"name": "long", "kind": "openai", "model": MODEL, "prompt": "Describe it.", "base_url": server.url}
    return f"captioners={yaml.safe_dump([{**given, **settings}], default_flow_style=True, width=10**6).strip()}"


def captions(out: Path) -> dict[str, list[str]]:
    return {sample.key: sample.caption_sets["long"] for sample in Store.open(out / "store")}


def probes_left_out(server: CaptionServer) -> list[Asked]:
    """The requests about samples."""
    return [asked for asked in server.requests if asked.prompt != "Describe this image in one sentence."]


@pytest.mark.slow
def test_a_captioner_makes_a_set_that_encoders_encode(tmp_path: Path) -> None:
    with serve() as server:
        summary = precompute(tmp_path / "run", *SMALL[:-1], captioner(server, weight=3, image_px=16))
        asked = probes_left_out(server)
    store = Store.open(tmp_path / "run" / "store")
    assert store.caption_sets == {"original": 1.0, "long": 3.0}
    by_text = {caption_of(each.number): each for each in asked}
    assert len(asked) == len(store) == KEYS
    for sample in store:
        (caption,) = sample.caption_sets["long"]
        assert caption in by_text
        assert len(sample.set_texts["long"]["t5"]) == 1
        body = by_text[caption].body
        assert body["seed"] == question_seed(0, sample.key, 0)
        assert (body["temperature"], body["max_tokens"], body["model"]) == (0.0, 256, MODEL)
    made_by = store.manifest.captions["long"].made_by
    assert made_by["prompt"] == "Describe it."
    assert made_by["found"]["answers_as"] == MODEL
    assert made_by["found"]["listed"] == {"id": MODEL, "max_model_len": 4096}
    assert len(made_by["found"]["probe"]) == 2
    assert "base_url" not in made_by
    counters = summary["tally"]["groups"]["captions-long"]["counters"]
    assert (counters["requests"], counters["tokens_in"], counters["captions"]) == (KEYS, 100 * KEYS, KEYS)
    rows = [row for path in sorted((tmp_path / "run/store/captions-long").iterdir()) for row in read_captions(path)]
    assert {reason for row in rows for reason in row.finish_reasons} == {"stop"}
    assert {row.seeds for row in rows} == {(question_seed(0, sample.key, 0),) for sample in store}
    assert verify_store(tmp_path / "run" / "store").ok
    assert not list((tmp_path / "run" / "captioners" / "long").glob("0*"))


def test_the_image_has_the_size_that_was_asked_for(tmp_path: Path) -> None:
    import io

    from PIL import Image

    with serve() as server:
        precompute(tmp_path / "run", *SMALL, captioner(server, image_px=20))
        sizes = {Image.open(io.BytesIO(asked.image)).size for asked in probes_left_out(server)}
    assert {max(size) for size in sizes} == {20}


def test_placeholders_are_filled_as_text(tmp_path: Path) -> None:
    with serve() as server:
        precompute(tmp_path / "run", *SMALL, captioner(server, prompt="{{x}} {width}x{height} {caption} {key}"))
        prompts = {asked.prompt for asked in probes_left_out(server)}
    store = Store.open(tmp_path / "run" / "store")
    assert prompts == {f"{{x}} {s.width}x{s.height} {s.captions[0]} {s.key}" for s in store}


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("Say {colour}.", "{colour} is not known; use {caption}, {key}"),
        ("Say {caption.__class__}", "{caption.__class__} is not known"),
        ("Say {caption", "expected '}' before end of string"),
        ("Say {caption!r:>3}", "{caption!r:>3} is no placeholder"),
        ('As {"a": 1}', '{"a": 1} is no placeholder'),
    ],
)
def test_a_prompt_with_unknown_columns_is_refused_before_anything_is_made(
    prompt: str, says: str, tmp_path: Path
) -> None:
    server = CaptionServer(url="http://127.0.0.1:9/v1")
    with pytest.raises(ConfigError) as error:
        precompute(tmp_path / "run", *SMALL, captioner(server, prompt=prompt))
    assert says in str(error.value)
    assert not (tmp_path / "run" / "store").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"base_url": "localhost:1"}, "is no http or https URL"),
        ({"base_url": ["http://a/v1", "http://a/v1"]}, "several different ones"),
        ({"base_url": "http://me:secret@a/v1"}, "holds a user or password"),
        ({"extra_body": {"seed": 1}}, "seed is set otherwise"),
        ({"max_cost": 1.0}, "max_cost needs price_per_million"),
        ({"checks": {"refusals": ["("]}}, "is no regular expression"),
        ({"name": "original"}, "another set of captions 'original'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        precompute(tmp_path / "run", *SMALL, captioner(CaptionServer(url="http://a/v1"), **settings))
    assert says in str(error.value)
    assert "secret" not in str(error.value)


FAULTY: dict[str, tuple[str, int]] = {
    "empty": ("empty_answer", 2),
    "refused": ("refused", 2),
    "cut": ("cut", 2),
    "loop": ("loop", 2),
    "html": ("no_answer", 3),
    "half": ("half_answer", 3),
    "other_model": ("other_model", 3),
    "error_500": ("server_error", 3),
    "too_large": ("image_too_large", 1),
    "bad_request": ("request_refused", 1),
}
"""Fault of the server -> the reason that is counted, and how many requests are made."""


def faulty_one(fault: str) -> CaptionServer:
    """The answers about one image are faulty, whatever the seed."""
    chosen: list[str] = []

    def fault_of(asked: Asked) -> str | None:
        if asked.prompt == "Describe it." and not chosen:
            chosen.append(asked.number)
        return fault if asked.number in chosen else None

    return CaptionServer(fault=fault_of)


@pytest.mark.parametrize("fault", FAULTY)
def test_a_bad_answer_is_tried_again_and_then_counted(fault: str, tmp_path: Path) -> None:
    reason, requests = FAULTY[fault]
    with serve(faulty_one(fault)) as server:
        summary = precompute(tmp_path / "run", *SMALL, captioner(server))
        assert max(n for n in server.by_image.values()) == max(requests, 2)  # 2 of the probe
        assert len(probes_left_out(server)) == KEYS - 1 + requests
    group = summary["tally"]["groups"]["captions-long"]
    assert group["drops"] == {reason: 1}
    assert (group["counters"]["captions"], group["counters"]["samples_without"]) == (KEYS - 1, 1)
    found = captions(tmp_path / "run")
    assert sorted(map(len, found.values())) == [0] + [1] * (KEYS - 1), "the sample stays"
    assert verify_store(tmp_path / "run" / "store").ok


def test_samples_without_a_good_caption_are_dropped_where_that_is_wanted(tmp_path: Path) -> None:
    with serve(faulty_one("refused")) as server:
        precompute(tmp_path / "run", *SMALL, captioner(server, on_bad="drop"))
    store = Store.open(tmp_path / "run" / "store")
    assert len(store) == KEYS - 1
    assert [set(rows.values()) for rows in store.manifest.excluded.values()] == [{"refused"}]
    assert verify_store(tmp_path / "run" / "store").ok


@pytest.mark.slow
def test_a_busy_server_is_waited_for(tmp_path: Path) -> None:
    with serve(CaptionServer(fault=lambda asked: "busy")) as server:
        summary = precompute(tmp_path / "run", *SMALL, captioner(server))
        assert set(server.by_image.values()) == {2, 3}  # of the probe, the first is tried again
    assert summary["tally"]["groups"]["captions-long"]["counters"]["captions"] == KEYS


def test_json_that_does_not_parse_is_counted(tmp_path: Path) -> None:
    with serve() as server:
        summary = precompute(tmp_path / "run", *SMALL, captioner(server, checks={"expect": "json"}, attempts=1))
    assert summary["tally"]["groups"]["captions-long"]["drops"] == {"not_json": KEYS}


def test_a_wrong_or_missing_key_ends_the_run_and_is_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(CaptionServer(key="right-secret")) as server:
        settings = captioner(server, api_key_env="CAPTION_ACCESS")
        for value, says in (
            (None, "CAPTION_ACCESS is not set"),
            ("wrong-secret", "in CAPTION_ACCESS is not accepted"),
        ):
            if value is not None:
                monkeypatch.setenv("CAPTION_ACCESS", value)
            with pytest.raises(PipelineError) as error:
                precompute(tmp_path / "run", *SMALL, settings)
            assert error.value.exit_code == 4
            assert says in str(error.value)
            assert "secret" not in str(error.value)
        monkeypatch.setenv("CAPTION_ACCESS", "right-secret")
        precompute(tmp_path / "run", *SMALL, settings)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert [path for path in files if b"-secret" in path.read_bytes()] == []


@pytest.mark.slow
def test_several_servers_share_the_requests(tmp_path: Path) -> None:
    with serve(CaptionServer(seconds=0.02)) as one, serve(CaptionServer(seconds=0.02)) as other:
        config = captioner(one, base_url=[one.url, other.url], max_in_flight=4)
        precompute(tmp_path / "run", "source.num_samples=40", "images.sizes_px=[8]", "shard_size=40", config)
        counts = [len(probes_left_out(server)) for server in (one, other)]
        assert max(one.most_in_flight, other.most_in_flight) <= 3
    assert sum(counts) == len(captions(tmp_path / "run"))
    assert min(counts) >= 0.4 * sum(counts)


def test_servers_of_different_models_are_refused(tmp_path: Path) -> None:
    with serve() as one, serve(CaptionServer(word="form")) as other:
        with pytest.raises(PipelineError, match=r"serves another model than .*probe") as error:
            precompute(tmp_path / "run", *SMALL, captioner(one, base_url=[one.url, other.url]))
        assert error.value.exit_code == MachineError.exit_code


def test_a_server_that_answers_as_another_model_is_refused(tmp_path: Path) -> None:
    says = "asked for 'tiny/describer' and answers as 'tiny/another'"
    with serve(CaptionServer(model="tiny/another")) as server, pytest.raises(PipelineError, match=says):
        precompute(tmp_path / "run", *SMALL, captioner(server))


def test_a_server_that_is_down_is_waited_for_as_long_as_stated(tmp_path: Path) -> None:
    server = CaptionServer(url="http://127.0.0.1:9/v1")
    with pytest.raises(PipelineError, match=r"gave no answer for 0\.3 s \(wait_for_server_s\)") as error:
        precompute(tmp_path / "run", *SMALL, captioner(server, wait_for_server_s=0.3))
    assert error.value.exit_code == UnavailableError.exit_code


@pytest.mark.slow
def test_another_model_on_resume_is_refused_by_name(tmp_path: Path) -> None:
    with serve(CaptionServer(most_answers=9)) as server, pytest.raises(PipelineError):
        precompute(tmp_path / "run", *SMALL, captioner(server, wait_for_server_s=0, tries=1))
    with serve(CaptionServer(word="form")) as server:
        with pytest.raises(PipelineError, match=r"(?s)captioners\.long: another model answers .*probe") as error:
            precompute(tmp_path / "run", *SMALL, captioner(server))
        assert error.value.exit_code == StaleOutputError.exit_code


@pytest.mark.slow
def test_captions_do_not_depend_on_the_executor(tmp_path: Path) -> None:
    with serve() as server:
        precompute(tmp_path / "a", *SMALL, captioner(server))
        precompute(tmp_path / "b", *SMALL, captioner(server), executor="local")
    assert store_bytes(tmp_path / "a") == store_bytes(tmp_path / "b")
