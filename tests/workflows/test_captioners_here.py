"""`captioners` of `kind: transformers`: an image-text model in our own workers, from the originals to the store."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from imagen_core.store import Store, read_captions, verify_store
from pipeline.errors import MachineError, PipelineError, StaleOutputError
from pipeline.storage.run_folder import RunFolder
from stages.captioners.base import Question, question_seed
from stages.captioners.transformers import GeneratingCaptioner
from stages.captions import clean_caption
from stages.precompute.captioning.make import MakeCaptionsStage
from stages.precompute.originals import OriginalsReader
from tests.commands import call
from tests.runs import precompute, store_bytes
from tests.stages.captioners.test_transformers import own_generate
from tests.stages.captioners.tiny_describers import write_describer
from workflows.precompute import Precompute, PrecomputeConfig

SMALL = ("source.num_samples=12", "shard_size=5", "images.sizes_px=[8]", "encoders=[]", "keep_originals=true")
KEYS = 11
"""Samples: one link of the synthetic source is dead."""
ANY = {"allow_cut": True, "max_repeats": None, "refusals": []}
"""Checks that let everything pass that a random model says."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("models") / "tiny-vlm"
    write_describer(found, "llava")
    return found


def captioner(model: Path, **settings: Any) -> str:
    given = {"name": "short", "kind": "transformers", "model": str(model), "prompt": "a {caption}", "max_tokens": 12}
    machine = {"compute_dtype": "float32", "num_gpus": 0, "cpu_threads": 1, "batch_size": 4}
    config = [{**given, **machine, "checks": ANY, **settings}]
    return f"captioners={yaml.safe_dump(config, default_flow_style=True, width=10**6).strip()}"


def tally(summary: dict[str, Any]) -> dict[str, Any]:
    return summary["tally"]["groups"]["captions-short"]


def originals(out: Path) -> dict[str, Image.Image]:
    found: dict[str, Image.Image] = {}
    for file in sorted((out / "staging" / "originals").glob("*.tar")):
        with OriginalsReader(file) as reader:
            for entry in reader.entries:
                if entry.size:
                    (out / "image").write_bytes(reader.data(entry))
                    found[entry.key] = Image.open(out / "image").convert("RGB")
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The seeds of each batch that the model is asked about."""
    batches: list[tuple[int, ...]] = []
    honest = GeneratingCaptioner.caption

    def caption(self: GeneratingCaptioner, questions: list[Question]) -> Any:
        batches.append(tuple(question.seed for question in questions))
        return honest(self, questions)

    monkeypatch.setattr(GeneratingCaptioner, "caption", caption)
    return batches


@pytest.mark.slow
def test_a_run_makes_the_captions_that_generate_makes_of_the_originals(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = precompute(out, *SMALL[:3], SMALL[4], captioner(model, weight=3))
    store = Store.open(out / "store")
    images = originals(out)
    questions = [Question(i, 0, 0, f"a {s.captions[0]}", images[s.key]) for i, s in enumerate(store)]
    own = own_generate(model, questions, do_sample=False)
    expected = [clean_caption(text) for text, _, _ in own]
    assert [sample.caption_sets["short"] for sample in store] == [[text] if text else [] for text in expected]
    assert len(set(expected)) == KEYS
    assert store.caption_sets == {"original": 1.0, "short": 3.0}
    assert all(len(sample.set_texts["short"]["t5"]) == len(sample.caption_sets["short"]) for sample in store)
    counters = tally(summary)["counters"]
    assert (counters["requests"], counters["captions"]) == (KEYS, sum(map(bool, expected)))
    assert counters["tokens_in"] == sum(length for _, _, length in own)
    assert counters["tokens_out"] == sum(len(tokens) for _, tokens, _ in own)
    made_by = store.manifest.captions["short"].made_by
    assert (made_by["kind"], made_by["model"], len(made_by["weights_sha256"])) == ("transformers", "tiny-vlm", 64)
    assert set(made_by["found"]) == {"torch", "transformers"}
    assert str(tmp_path.parent) not in str(made_by)
    rows = [row for path in sorted((out / "store/captions-short").iterdir()) for row in read_captions(path)]
    seeds = {sample.key: question_seed(0, sample.key, 0) for sample in store}
    assert [row.seeds for row in rows] == [(seeds[sample.key],) for sample in store]
    assert verify_store(out / "store").ok


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_run_that_was_interrupted_asks_nothing_twice_and_ends_with_the_same_bytes(
    temperature: float, model: Path, tmp_path: Path, asked: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = captioner(model, temperature=temperature, batch_size=3)
    precompute(tmp_path / "whole", *SMALL, config)
    whole = Counter(seed for batch in asked for seed in batch)
    asked.clear()
    honest = GeneratingCaptioner.answers

    def answers(self: GeneratingCaptioner, next_question: Any) -> Any:
        for count, answer in enumerate(honest(self, next_question)):
            if count == 3:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(GeneratingCaptioner, "answers", answers)
    starts = 0
    while not (tmp_path / "run/store/manifest.json").exists():
        starts += 1
        try:
            precompute(tmp_path / "run", *SMALL, config)
        except KeyboardInterrupt:
            assert starts < KEYS
    assert starts > 2
    again = Counter(seed for batch in asked for seed in batch)
    assert set(again) == set(whole)
    assert set(whole.values()) == {1}
    assert sum(again.values()) <= KEYS + starts * 3, "only the batch that was at work"
    assert store_bytes(tmp_path / "run") == store_bytes(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_captions_do_not_depend_on_the_executor(executor: str, model: Path, tmp_path: Path) -> None:
    precompute(tmp_path / "a", *SMALL, captioner(model))
    precompute(tmp_path / "b", *SMALL, captioner(model, workers=2, batch_size=2), executor=executor)
    assert store_bytes(tmp_path / "a") == store_bytes(tmp_path / "b")


@pytest.mark.slow
def test_a_bad_caption_is_asked_for_again_only_where_another_seed_may_change_it(
    model: Path, tmp_path: Path, asked: list[tuple[int, ...]]
) -> None:
    for temperature, attempts in ((0.0, 1), (1.0, 3)):
        asked.clear()
        refused = captioner(model, checks={"refusals": [""]}, attempts=3, temperature=temperature)
        out = tmp_path / f"run{attempts}"
        summary = precompute(out, *SMALL, refused)
        seeds = [seed for batch in asked for seed in batch]
        keys = [sample.key for sample in Store.open(out / "store")]
        assert sorted(seeds) == sorted(question_seed(0, key, n) for key in keys for n in range(attempts))
        assert tally(summary)["counters"]["requests"] == KEYS * attempts
        assert sum(tally(summary)["drops"].values()) == KEYS
        assert all(sample.caption_sets["short"] == [] for sample in Store.open(out / "store"))


def test_captions_that_are_cut_at_max_tokens_are_counted(model: Path, tmp_path: Path) -> None:
    summary = precompute(tmp_path / "run", *SMALL, captioner(model, max_tokens=2, checks={**ANY, "allow_cut": False}))
    found = tally(summary)
    assert found["drops"]["cut"] + found["drops"].get("empty_answer", 0) + found["counters"]["captions"] == KEYS
    assert found["drops"]["cut"] > KEYS / 2


def test_a_caption_of_the_source_with_a_control_token_refuses_its_row_alone(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, text in (("a", "a cat"), ("b", "struck </s> out"), ("c", "a dog")):
        Image.new("RGB", (20, 20), (200, 10, 10)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(text)
    source = ("source.kind=folder", f"source.path={folder}", *SMALL[2:])
    summary = precompute(tmp_path / "run", *source, captioner(model))
    assert tally(summary)["drops"] == {"request_refused": 1}
    lines = (tmp_path / "run/quarantine/captions-short/00000.jsonl").read_text().splitlines()
    assert [json.loads(line)["detail"] for line in lines] == ["</s> stands in the prompt"]
    assert [len(sample.caption_sets["short"]) for sample in Store.open(tmp_path / "run/store")] == [1, 0, 1]


def test_other_weights_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "tiny-vlm"
    write_describer(other, "llava")
    precompute(tmp_path / "run", *SMALL, captioner(model))
    precompute(tmp_path / "run", *SMALL, captioner(other, batch_size=1))  # the same weights elsewhere
    write_describer(other, "llava", seed=1)
    with pytest.raises(PipelineError, match=r"captions-short\.made_by\.weights_sha256") as error:
        precompute(tmp_path / "run", *SMALL, captioner(other))
    assert error.value.exit_code == StaleOutputError.exit_code


def test_a_worker_that_finds_another_model_than_the_driver_ends_the_run(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "tiny-vlm"
    write_describer(other, "llava")
    config = PrecomputeConfig.model_validate({"captioners": yaml.safe_load(captioner(other).partition("=")[2])})
    stages = Precompute(config).plan(RunFolder(str(tmp_path / "run"))).stages
    (stage,) = (each for each in stages if isinstance(each, MakeCaptionsStage))
    write_describer(other, "llava", seed=1)
    with pytest.raises(MachineError, match=r"captioners\.short: this worker finds another model .* weights_sha256"):
        stage.setup(RunFolder(str(tmp_path / "run")))


def test_workers_are_one_for_each_gpu_unless_said_otherwise(model: Path, tmp_path: Path) -> None:
    for settings, expected in (
        ({"num_gpus": None}, (0, 1.0, None)),
        ({"num_gpus": 0.5, "workers": 4, "num_cpus": 2}, (4, 2.0, 0.5)),
    ):
        given = yaml.safe_load(captioner(model, **settings).partition("=")[2])
        stages = (
            Precompute(PrecomputeConfig.model_validate({"captioners": given})).plan(RunFolder(str(tmp_path))).stages
        )
        (stage,) = (each for each in stages if isinstance(each, MakeCaptionsStage))
        assert (stage.max_workers, stage.resources.num_cpus, stage.resources.num_gpus) == expected


def test_a_model_that_is_no_describer_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"captioners\.short\.model: .*/absent is not a folder"):
        precompute(tmp_path / "run", *SMALL, captioner(tmp_path / "absent"))
    assert not (tmp_path / "run" / "store").exists()


@pytest.mark.slow
def test_plan_states_requests_and_tokens_and_loads_no_model(model: Path, tmp_path: Path) -> None:
    settings = captioner(model, image_px=280, max_tokens=50)
    planned = json.loads(call("plan", "precompute", "--out", str(tmp_path / "run"), "--json", *SMALL, settings).out)
    found = planned["outlook"]["captions-short"]
    assert (found["requests"], found["tokens_out"], "cost" in found) == (12, 600, False)
    assert not (tmp_path / "run").exists()
