"""`captioners` with llama.cpp's own server and a tiny random model; skipped where the server is not there."""

from pathlib import Path
from typing import Any

import pytest

from imagen_core.store import Store, verify_store
from pipeline.errors import PipelineError, StaleOutputError
from tests.caption_server import CaptionServer
from tests.llama_cpp import llama_server, server_path
from tests.runs import precompute, store_bytes
from tests.workflows.test_captioners import KEYS, SMALL, captioner, captions

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def needs_llama_cpp() -> None:
    pytest.importorskip("gguf")
    if server_path() is None:
        pytest.skip("needs llama-server in PATH or LLAMA_SERVER")


def with_tiny(url: str, **settings: Any) -> str:
    given = {"model": "tiny", "max_tokens": 16, "image_px": 32, "max_in_flight": 4, "checks": {"allow_cut": True}}
    return captioner(CaptionServer(url=url), **{**given, **settings})


def test_a_run_has_the_captions_that_the_server_gives(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with llama_server(tmp_path / "model") as url:
        summary = precompute(out, *SMALL, "keep_originals=true", with_tiny(url))
        found = captions(out)
        again = precompute(tmp_path / "again", *SMALL, with_tiny(url), executor="local")
    counters = summary["tally"]["groups"]["captions-long"]["counters"]
    assert counters["requests"] >= counters["captions"] > KEYS / 2
    assert counters["tokens_in"] > 0 < counters["tokens_out"] <= 16 * counters["requests"]
    assert len({tuple(texts) for texts in found.values()}) > KEYS / 2, "they depend on the image"
    made_by = Store.open(out / "store").manifest.captions["long"].made_by["found"]
    assert made_by["answers_as"] == "tiny"
    assert made_by["headers"] == {"server": "llama.cpp"}
    assert captions(tmp_path / "again") == found
    assert again["tally"]["groups"]["captions-long"]["counters"] == counters
    assert verify_store(out / "store").ok


def test_another_model_behind_the_same_name_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with llama_server(tmp_path / "one") as url, pytest.raises(PipelineError, match="max_requests"):
        precompute(out, *SMALL, with_tiny(url, max_requests=3))
    with llama_server(tmp_path / "other", seed=7) as url:
        with pytest.raises(PipelineError, match=r"captioners\.long: another model answers .*probe") as error:
            precompute(out, *SMALL, with_tiny(url))
        assert error.value.exit_code == StaleOutputError.exit_code
    with llama_server(tmp_path / "one") as url:
        precompute(out, *SMALL, with_tiny(url))
        precompute(tmp_path / "whole", *SMALL, with_tiny(url))
    assert store_bytes(out) == store_bytes(tmp_path / "whole")
