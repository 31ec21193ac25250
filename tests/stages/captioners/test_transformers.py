"""`kind: transformers`: captions are those of transformers' own `generate`, whatever the batch."""

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ConfigError, MachineError
from stages.captioners.base import Answer, Question, question_seed
from stages.captioners.transformers import GeneratingCaptioner, TransformersCaptionerConfig
from tests.stages.captioners.tiny_describers import KINDS, write_describer

PROMPTS = ("a", "what is there in it", "a small red circle on a blue ground and nothing else")
MAX_TOKENS = 12


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model") / request.param
    write_describer(found, request.param)
    return found


def captioner(folder: Path, **settings: Any) -> GeneratingCaptioner:
    given = {
        "name": "a",
        "model": str(folder),
        "prompt": "a",
        "compute_dtype": "float32",
        "num_gpus": 0,
        "cpu_threads": 1,
    }
    return GeneratingCaptioner(TransformersCaptionerConfig(**{**given, "max_tokens": MAX_TOKENS, **settings}))


def questions(count: int = 6) -> list[Question]:
    """Of three prompts of different lengths, and images of different sizes."""
    random = np.random.default_rng(3)
    images = [random.integers(0, 255, (20 + 4 * i, 44 - 3 * i, 3), np.uint8) for i in range(count)]
    return [
        Question(i, 0, question_seed(0, str(i), 0), PROMPTS[i % 3], Image.fromarray(image))
        for i, image in enumerate(images)
    ]


def own_generate(folder: Path, asked: list[Question], **settings: Any) -> list[tuple[str, list[int], int]]:
    """Text, tokens, and length of the prompt, as transformers alone makes them of one question at a time."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    found = []
    for question in asked:
        content = [{"type": "image", "image": question.image}, {"type": "text", "text": question.prompt}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        torch.manual_seed(question.seed)
        output = model.generate(**inputs, max_new_tokens=MAX_TOKENS, **settings)
        tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
        found.append((processor.decode(tokens, skip_special_tokens=True), tokens, inputs["input_ids"].shape[1]))
    return found


def test_captions_are_those_of_generate_whatever_the_batch(folder: Path) -> None:
    made, asked = captioner(folder), questions()
    expected = own_generate(folder, asked, do_sample=False)
    texts = [text for text, _, _ in expected]
    assert len(set(texts)) == len(asked), "or this shows little"
    assert len({length for _, _, length in expected}) >= 3, "padding is needed"
    end = made.tokenizer.eos_token_id
    answers = [
        Answer(text, "stop" if end in tokens else "length", length, len(tokens)) for text, tokens, length in expected
    ]
    for size in (1, 2, len(asked)):
        batches = [asked[at : at + size] for at in range(0, len(asked), size)]
        assert [answer for batch in batches for answer in made.caption(batch)] == answers
    assert made.caption(asked[::-1]) == answers[::-1]


def test_a_caption_ends_at_the_end_token_and_what_follows_it_in_a_batch_is_left_out(folder: Path) -> None:
    asked = questions()
    expected = own_generate(folder, asked, do_sample=False)
    made = captioner(folder)
    (early,) = {tokens[3] for _, tokens, _ in expected[:1]}
    made._ends = [early]  # the fourth token of the first caption
    found = made.caption(asked)
    for answer, (_, tokens, _) in zip(found, expected, strict=True):
        length = tokens.index(early) + 1 if early in tokens else MAX_TOKENS
        ends = "stop" if early in tokens else "length"
        assert (answer.finish_reason, answer.tokens_out) == (ends, length)
        assert answer.text == made.tokenizer.decode(tokens[:length], skip_special_tokens=True)
    assert {answer.finish_reason for answer in found} == {"stop", "length"}


def test_sampled_captions_follow_from_their_own_seed(folder: Path) -> None:
    made, asked = captioner(folder, temperature=1.0), questions(4)
    own = own_generate(folder, asked, do_sample=True, temperature=1.0)
    expected = {question.row: text for question, (text, _, _) in zip(asked, own, strict=True)}
    for order in (asked, asked[::-1]):
        left = deque(order)
        answers = made.answers(lambda left=left: left.popleft() if left else None)
        assert {question.row: answer.text for question, answer in answers} == expected
    assert len(set(expected.values())) == len(asked)


def test_a_prompt_with_a_control_token_is_refused_by_itself(folder: Path) -> None:
    made, asked = captioner(folder), questions(4)
    for token in ("<image>", "</s>", "<end_of_utterance>"):
        bad = Question(1, 0, 0, f"an {token} here", asked[1].image)
        found = made.caption([asked[0], bad, asked[2]])
        assert found[1] == Answer(problem=("request_refused", f"{token} stands in the prompt"))
        assert [found[0], found[2]] == made.caption([asked[0], asked[2]])


def test_a_prompt_that_is_too_long_for_the_model_is_refused_by_itself(folder: Path) -> None:
    made, asked = captioner(folder), questions(3)
    long = Question(1, 0, 0, "a " * 250, asked[1].image)
    found = made.caption([asked[0], long, asked[2]])
    assert found[1].problem is not None
    assert found[1].problem[0] == "request_refused"
    assert "and max_tokens=12, are more than the model's 256" in found[1].problem[1]
    assert [found[0], found[2]] == made.caption([asked[0], asked[2]])


def test_batches_that_do_not_fit_into_memory_are_halved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = captioner(folder), questions()
    expected, generate, sizes = made.caption(asked), made.model.generate, []

    def small(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise MemoryError
        return generate(**inputs)

    monkeypatch.setattr(made.model, "generate", small)
    assert made.caption(asked) == expected
    assert sizes == [6, 4, 2, 2, 2]
    left = deque(asked)
    assert [answer for _, answer in made.answers(lambda: left.popleft() if left else None)] == expected
    assert sizes[5:] == [2, 2, 2]


def test_a_processor_that_pads_on_the_right_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = captioner(folder), questions(2)
    made.tokenizer.padding_side = "right"
    with pytest.raises(MachineError, match=r"captioners\.a\.model: .* pads on the right whatever it is told"):
        made.caption(asked)
    assert made.caption(asked[:1])[0].problem is None


def test_the_prompt_of_the_configuration_has_no_control_token(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"captioners\.a\.prompt: '<image>' is a control token of"):
        captioner(folder, prompt="Describe <image> {caption}")


@pytest.mark.parametrize(
    ("file", "says", "error"),
    [
        ("chat_template.jinja", "has no processor with a chat template", ConfigError),
        ("processor_config.json", "cannot be loaded", MachineError),
        ("model.safetensors", r"has no model\*\.safetensors", MachineError),
        ("config.json", "has no config.json", MachineError),
    ],
)
def test_a_model_with_missing_files_is_refused(file: str, says: str, error: type[Exception], tmp_path: Path) -> None:
    write_describer(tmp_path / "model", "llava")
    (tmp_path / "model" / file).unlink()
    with pytest.raises(error, match=rf"captioners\.a\.model: {tmp_path}/model {says}"):
        captioner(tmp_path / "model")


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    from stages.encoders.tiny import write_tiny_model

    write_tiny_model(tmp_path / "t5")
    with pytest.raises(MachineError, match=r"captioners\.a\.model: .* cannot be loaded: .*T5"):
        captioner(tmp_path / "t5")


def test_everything_that_decides_a_caption_is_in_the_identity(tmp_path: Path) -> None:
    write_describer(tmp_path / "model", "llava")

    def made_by(**settings: Any) -> dict[str, Any]:
        given = {"name": "a", "model": str(tmp_path / "model"), "prompt": "a"}
        return TransformersCaptionerConfig(**{**given, **settings}).made_by()

    before = made_by()
    assert (before["model"], before["revision"], len(before["weights_sha256"])) == ("model", None, 64)
    assert str(tmp_path) not in str(before)
    same = made_by(batch_size=1, num_gpus=0, workers=3, num_cpus=2, cpu_threads=1, resources={"a": 1})
    assert same == before
    for settings in ({"prompt": "b"}, {"max_tokens": 3}, {"compute_dtype": "float32"}, {"image_px": 32}, {"seed": 1}):
        assert made_by(**settings) != before
    for file in ("chat_template.jinja", "generation_config.json", "processor_config.json", "tokenizer.json"):
        path = tmp_path / "model" / file
        kept = path.read_bytes()
        path.write_bytes(kept + b"\n")
        assert made_by() != before
        path.write_bytes(kept)
    assert made_by() == before
    write_describer(tmp_path / "model", "llava", seed=1)
    assert {name for name, value in made_by().items() if value != before[name]} == {"weights_sha256"}
