"""Captioners over several starts: limits, kept answers, rows that are asked about again, captioners added later."""

import json
import random
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from imagen_core.store import verify_store
from pipeline.config import load_config
from pipeline.errors import EXIT_INCOMPLETE, ConfigError, PipelineError
from pipeline.options import RunOptions
from tests.caption_server import CaptionServer, fault_of, serve
from tests.commands import call
from tests.processes import descendants, wait_until_gone
from tests.runs import REPOSITORY, command, precompute, store_bytes
from tests.workflows.test_captioners import KEYS, SMALL, captioner, captions, faulty_one, probes_left_out
from workflows.precompute import Precompute, PrecomputeConfig


def counters(summary: dict[str, Any]) -> dict[str, float]:
    return summary["tally"]["groups"]["captions-long"]["counters"]


def retry(out: Path, *overrides: str, reasons: tuple[str, ...]) -> dict[str, Any]:
    workflow = Precompute(load_config(PrecomputeConfig, None, overrides))
    return workflow.run(str(out), RunOptions("inline", retry_dropped=reasons, quiet=True))


@pytest.mark.slow
def test_a_limit_on_requests_ends_the_run_and_the_next_one_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with serve() as server:
        precompute(tmp_path / "whole", *SMALL, captioner(server))
        server.requests.clear()
        for most in (3, 7):
            with pytest.raises(PipelineError, match=rf"max_requests: {most} requests were answered") as error:
                precompute(out, *SMALL, captioner(server, max_requests=most, max_in_flight=2))
            assert error.value.exit_code == EXIT_INCOMPLETE
            assert len(probes_left_out(server)) == most
        summary = precompute(out, *SMALL, captioner(server, max_requests=KEYS))
        asked = Counter(each.number for each in probes_left_out(server))
    assert set(asked.values()) == {1}, "what was answered is never asked again"
    assert counters(summary)["requests"] == KEYS
    assert store_bytes(out) == store_bytes(tmp_path / "whole")


def test_a_limit_on_money_is_not_exceeded(tmp_path: Path) -> None:
    price = {"input": 1000, "output": 10_000}  # 0.1 for each prompt, 0.09 for each answer of 9 tokens
    with serve() as server:
        config = captioner(server, price_per_million=price, max_cost=1.0, max_tokens=10, max_in_flight=3)
        with pytest.raises(PipelineError, match=r"max_cost: 0\.95 was spent on 5 requests, .* exceed 1") as error:
            precompute(tmp_path / "run", *SMALL, config)
        assert error.value.exit_code == EXIT_INCOMPLETE
        assert len(probes_left_out(server)) == 5


def test_money_cannot_be_limited_where_a_server_does_not_count_tokens(tmp_path: Path) -> None:
    with serve(CaptionServer(usage=False)) as server:
        config = captioner(server, price_per_million={"input": 1, "output": 1}, max_cost=1.0)
        with pytest.raises(PipelineError, match="does not say how many tokens an answer took"):
            precompute(tmp_path / "run", *SMALL, config)


@pytest.mark.slow
def test_a_damaged_line_of_the_kept_answers_is_asked_for_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with serve() as server:
        with pytest.raises(PipelineError):
            precompute(out, *SMALL, captioner(server, max_requests=3))
        (log,) = (out / "captioners" / "long").glob("*.jsonl")
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b"".join([*lines[:-2], lines[-2].replace(b"shape", b"other"), lines[-1][:40]]))
        precompute(out, *SMALL, captioner(server))
        asked = Counter(each.number for each in probes_left_out(server))
        precompute(tmp_path / "whole", *SMALL, captioner(server))
    assert sorted(asked.values()) == [1] * (KEYS - 2) + [2, 2]
    assert store_bytes(out) == store_bytes(tmp_path / "whole")


def test_rows_without_a_caption_are_asked_about_again_and_no_others(tmp_path: Path) -> None:
    out, server = tmp_path / "run", faulty_one("refused")
    with serve(server):
        precompute(out, *SMALL, captioner(server))
        before = captions(out)
        requests = len(server.requests)
        with pytest.raises(ConfigError, match="no dropped sample has it"):
            retry(out, *SMALL, captioner(server), reasons=("loop",))
        still = retry(out, *SMALL, captioner(server), reasons=("refused",))
        asked = [each for each in server.requests[requests:] if each.prompt == "Describe it."]
        assert len({each.number for each in asked}) == 1
        assert len({each.body["seed"] for each in server.requests if each.number == asked[0].number}) == 4
        assert counters(still)["requests"] == KEYS + 3
        server.fault = lambda asked: None
        summary = retry(out, *SMALL, captioner(server), reasons=("all",))
    assert summary["tally"]["groups"]["captions-long"]["drops"] == {}
    assert counters(summary) == {
        "captions": KEYS,
        "distinct_captions": KEYS,
        "samples_without": 0,
        "requests": KEYS + 4,
        "tokens_in": 100 * (KEYS + 4),
        "tokens_out": counters(summary)["tokens_out"],
    }
    found = captions(out)
    assert {key for key in found if found[key] != before[key]} == {key for key in before if not before[key]}
    assert verify_store(out / "store").ok


def test_a_captioner_added_to_a_finished_run_changes_no_other_file(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with serve() as server:
        precompute(out, *SMALL, "keep_originals=true")
        before = store_bytes(out)
        precompute(out, *SMALL, "keep_originals=true", captioner(server))
        after = store_bytes(out)
        precompute(tmp_path / "fresh", *SMALL, "keep_originals=true", captioner(server))
    added = {name.split("/")[0] for name in after.keys() - before.keys()}
    assert added == {"captions-long"}
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}
    assert store_bytes(tmp_path / "fresh") == after


def test_another_prompt_is_refused_and_another_server_address_is_not(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with serve() as server:
        precompute(out, *SMALL, captioner(server))
        with pytest.raises(PipelineError, match=r"captions-long\.made_by\.prompt: Describe it\. -> Count\."):
            precompute(out, *SMALL, captioner(server, prompt="Count."))
    with serve() as server:
        precompute(out, *SMALL, captioner(server, max_in_flight=1, timeout_s=5))
        assert server.requests == []


@pytest.mark.slow
def test_plan_states_requests_tokens_and_money(tmp_path: Path) -> None:
    with serve() as server:
        settings = captioner(
            server, image_px=280, max_tokens=50, price_per_million={"input": 10_000, "output": 100_000}
        )
        planned = json.loads(
            call("plan", "precompute", "--out", str(tmp_path / "run"), "--json", *SMALL, settings).out
        )
        found = planned["outlook"]["captions-long"]
        assert (found["requests"], found["tokens_in"], found["tokens_out"]) == (12, 12 * 103, 600)
        assert found["cost"] == pytest.approx(12.36 + 60)
        assert server.requests == [], "a plan asks no server"
        limited = captioner(server, image_px=280, max_tokens=50, max_requests=5)
        with pytest.raises(PipelineError):
            precompute(tmp_path / "run", *SMALL, limited)
        text = call("plan", "precompute", "--out", str(tmp_path / "run"), *SMALL, settings).out
    line = next(line for line in text.splitlines() if line.startswith("captions-long:"))
    assert "7 requests, 700 tokens in, 63 out, 13.3 by price_per_million (measured on 4 samples)" in line


def start(out: Path, config: list[str]) -> subprocess.Popen[bytes]:
    arguments = command("run", "precompute", "--out", str(out), "--executor", "local", "--quiet", *config)
    return subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=REPOSITORY, start_new_session=True
    )


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bytes_and_ask_little_again(tmp_path: Path) -> None:
    """About 2,000 images, of which a tenth is answered wrongly in ten ways."""
    out, chance, size = tmp_path / "run", random.Random(7), 100
    small = [
        "source.num_samples=2000",
        f"shard_size={size}",
        "images.sizes_px=[]",
        "encoders=[]",
        "images.sizes_px=[8]",
    ]
    with serve(CaptionServer(fault_share=0.1, seconds=0.03, keep=False)) as server:
        config = [*small, "keep_originals=true", captioner(server, image_px=32, max_in_flight=16)]
        summary = precompute(tmp_path / "whole", *config, executor="local")
        once = +server.by_image_and_seed
        server.by_image_and_seed.clear()
        server.by_image.clear()
        kills, children = 0, []
        while kills < 20:
            process, asked = start(out, config), server.answered
            ends = time.monotonic() + 60
            while server.answered < asked + 20 and process.poll() is None and time.monotonic() < ends:
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 0.5))
            if process.poll() is not None:
                break
            children += descendants(process.pid)
            process.kill()
            process.wait()
            kills += 1
        precompute(out, *config, executor="local")
        again = server.by_image_and_seed - once
    assert kills >= 5
    assert store_bytes(out) == store_bytes(tmp_path / "whole")
    lasting = sum(again[key] for key in again if once[key] and fault_of(key[0], key[1], 0.1) != "busy")
    assert lasting <= kills * size, "at most a shard's: in flight, bad answers not yet decided, two known images"
    group = summary["tally"]["groups"]["captions-long"]
    samples = summary["num_samples"]
    assert group["counters"]["captions"] + sum(group["drops"].values()) == samples == group["rows"]
    assert set(group["drops"]) == {
        *("empty_answer", "refused", "cut", "loop", "no_answer", "half_answer", "other_model"),
        *("server_error", "image_too_large"),
    }
    assert 0.03 < sum(group["drops"].values()) / samples < 0.1
    assert not wait_until_gone(children, timeout_s=60)
