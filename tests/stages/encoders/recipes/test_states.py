"""The states of chosen layers equal transformers' hidden_states, whatever the batches, and padding has its rows."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from transformers import AutoModel, AutoTokenizer, Qwen3Model

from pipeline.errors import ConfigError
from stages.encoders import auto, probe
from stages.encoders.encoder import TextEncoder, load_encoder
from stages.encoders.probe import probe_problem, take_probe
from stages.encoders.prompts import encoder_of
from stages.encoders.registry import AnyEncoder
from tests.stages.encoders import tiny_models
from tests.stages.encoders.recipes.pipelines import DECODER, decoder, t5, write_tokenizer

CAPTIONS = ["a red circle above a blue square", "one", "two words"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(decoder("Qwen3"), tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(t5(), tmp_path_factory.mktemp("models") / "t5")


def config(folder: Path, **settings: Any) -> Any:
    machine = {"model": str(folder), "compute_dtype": "float32", "num_gpus": 0}
    return TypeAdapter(AnyEncoder).validate_python({"name": "text", "kind": "auto", **machine, **settings})


def load(folder: Path, **settings: Any) -> TextEncoder:
    return load_encoder(config(folder, **settings), 1)


@torch.inference_mode()
def hidden_states(folder: Path, caption: str) -> tuple[list[np.ndarray], np.ndarray]:
    """transformers' own, (length, width) each, and the last one before the final norm."""
    model = Qwen3Model.from_pretrained(folder, dtype=torch.float32).eval()
    before: list[torch.Tensor] = []
    model.norm.register_forward_pre_hook(lambda module, arguments: before.append(arguments[0]))
    ids = AutoTokenizer.from_pretrained(folder)(caption, return_tensors="pt").input_ids
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    return [state[0].numpy() for state in states], before[0][0].numpy()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_layers_are_joined_in_their_order(folder: Path) -> None:
    states, unnormed = hidden_states(folder, CAPTIONS[0])
    rms = [state / np.sqrt((state**2).mean(1, keepdims=True) + 1e-6) for state in (states[1], unnormed)]
    wanted = {
        "one": ({"layers": 1}, states[1]),
        "embeddings": ({"layers": [0]}, states[0]),
        "last": ({"layers": [-1]}, states[3]),
        "descending": ({"layers": [-1, -2]}, np.concatenate([states[3], states[2]], 1)),
        "all": ({"layers": "0:"}, np.concatenate(states, 1)),
        "interleaved": ({"layers": [1, 3], "join": "interleave"}, np.stack([states[1], states[3]], 2).reshape(-1, 64)),
        "stacked": ({"layers": [1, 2], "join": "stack"}, np.stack(states[1:3], 1).reshape(-1, 64)),
        "without norm": ({"final_norm": False}, unnormed),
        "without norm, two": ({"layers": [1, 3], "final_norm": False}, np.concatenate([states[1], unnormed], 1)),
        "norm without weights": ({"layers": [1, 3], "final_norm": "rms"}, np.concatenate(rms, 1)),
    }
    for name, (settings, expected) in wanted.items():
        encoder = load(folder, **settings)
        found = encoder.encode(CAPTIONS).embeddings
        assert_close(found[0], expected), name
        assert encoder.dim == expected.shape[1], name
        assert_close(encoder.encode(CAPTIONS[:1]).embeddings[0], found[0])


def test_layers_above_the_highest_one_are_not_run(folder: Path) -> None:
    model: Any = load(folder, layers=[1]).model
    assert len(model._model.layers) == 1
    less, all_of_it = (config(folder, layers=[layer]).workload(CAPTIONS).flops for layer in (1, 3))
    assert less == pytest.approx(all_of_it / 3)


def test_layers_out_of_range_are_refused_before_anything_is_loaded(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"encoders\.text\.layers: 9: the model has 3 layers; give indices from 0"):
        config(folder, layers=[1, 9]).identify()


def test_a_vision_language_model_without_a_text_side_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "siglip_vision_model", "hidden_size": 8}')
    with pytest.raises(ConfigError, match=r"is no text encoder \(model_type 'siglip_vision_model'.*give its text"):
        config(tmp_path).identify()


def idefics3(folder: Path) -> None:
    """A vision-language model that calls its language model `text_model`."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    text = {"model_type": "llama", **DECODER, "num_hidden_layers": 2, "vocab_size": write_tokenizer(folder, "<s> $A")}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = Idefics3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)


@torch.inference_mode()
def test_the_text_side_of_a_vision_language_model_is_found_or_the_model_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.write(idefics3, tmp_path / "idefics3")
    text_side = AutoModel.from_pretrained(model, dtype=torch.float32).eval().text_model
    ids = AutoTokenizer.from_pretrained(model)(CAPTIONS[0], return_tensors="pt").input_ids
    found = load(model, layers=[1, -1]).encode(CAPTIONS).embeddings[0]
    states = text_side(input_ids=ids, output_hidden_states=True).hidden_states
    assert_close(found, torch.cat([states[1], states[2]], -1)[0].numpy())
    monkeypatch.setattr(auto, "_TOWERS", ("language_model",))
    with pytest.raises(ConfigError, match=r"is no model with a text side .*model_type 'idefics3'.*give its text part"):
        load(model)


def test_a_decoders_padding_has_states_of_its_own(folder: Path) -> None:
    pads = {"to": 40, "mode": "masked"}
    encoder = load(folder, max_tokens=40, pads=pads)
    found = encoder.encode(CAPTIONS).embeddings
    plain = load(folder, max_tokens=40).encode(CAPTIONS).embeddings
    for padded, text in zip(found, plain, strict=True):
        assert padded.shape == (40, 32)
        assert_close(padded[: len(text)], text)
        assert np.abs(padded[len(text) :]).min() > 0


@pytest.mark.parametrize("mode", ["encoded", "zeroed"])
def test_padding_on_the_left_does_not_depend_on_the_batch(mode: str, folder: Path) -> None:
    encoder = load(folder, max_tokens=48, padding_side="left", pads={"multiple_of": 16, "mode": mode})
    alone = [encoder.encode([caption]).embeddings[0] for caption in CAPTIONS]
    assert [len(rows) for rows in alone] == [32, 16, 16]
    assert alone[1][: 16 - len("one")].any() == (mode == "encoded")
    for order in ([0, 1, 2], [2, 1, 0], [1, 0], [1, 2]):
        together = encoder.encode([CAPTIONS[i] for i in order]).embeddings
        for found, i in zip(together, order, strict=True):
            assert_close(found, alone[i])


def test_text_behind_the_padding_has_the_states_that_it_has_without(folder: Path) -> None:
    template = {"prefix": "See: ", "suffix_after_pads": "END"}
    options: dict[str, Any] = {"max_tokens": 40, "template": template}
    plain = load(folder, **options).encode(CAPTIONS).embeddings
    for padded, text in zip(load(folder, **options, pads={"to": 40}).encode(CAPTIONS).embeddings, plain, strict=True):
        assert padded.shape == (40, 32)
        assert_close(np.concatenate([padded[: len(text) - 3], padded[-3:]]), text)


def test_t5_attends_to_padding_only_where_it_is_encoded(t5_folder: Path) -> None:
    options: dict[str, Any] = {"kind": "t5", "max_tokens": 40}
    plain = load(t5_folder, **options).encode(CAPTIONS).embeddings
    masked, encoded, zeroed = (
        load(t5_folder, **options, pads={"to": 40, "mode": mode}).encode(CAPTIONS).embeddings
        for mode in ("masked", "encoded", "zeroed")
    )
    changed = (
        load(t5_folder, **options, pads={"to": 40, "mode": "encoded", "stored": False}).encode(CAPTIONS).embeddings
    )
    for text, one, two, three, four in zip(plain, masked, encoded, zeroed, changed, strict=True):
        n = len(text)
        assert one.shape == two.shape == three.shape == (40, 24)
        assert_close(one[:n], text)
        assert_close(three[:n], text)
        assert not three[n:].any()
        assert np.abs(two[:n] - text).max() > 1e-3
        assert_close(four, two[:n])


def test_a_recipe_is_had_back_from_its_fingerprint_with_the_same_numbers(folder: Path) -> None:
    settings = {
        "template": {"system": "Hi", "chat": {"enable_thinking": False}},
        "drop_prefix": "auto",
        "layers": [1, 2],
        "empty": "plain",
    }
    one = config(folder, **settings)
    identity = one.identify()
    assert identity.fingerprint["chat_text"][0].startswith("<|im_start|>system\nHi<|im_end|>")
    trained_on = {"name": "text", "dim": 64, "dtype": "float32", "fingerprint": identity.fingerprint}
    again = encoder_of(trained_on, str(folder), use_gpu=False)
    assert again.identify() == identity
    first, second = load_encoder(one, 1), load_encoder(again, 1)
    assert probe_problem(take_probe(first), take_probe(second), "float32") is None
    assert len(first.encode([""]).embeddings[0]) == 1


def test_another_version_of_a_package_that_cleans_captions_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ftfy = pytest.importorskip("ftfy")
    encoder = load(folder, cleaning=["ftfy"])
    before = take_probe(encoder)
    assert before["environment"]["ftfy"] == ftfy.__version__
    assert "ftfy" not in take_probe(load(folder))["environment"]
    monkeypatch.setattr(ftfy, "fix_text", lambda text: text)  # leaves the ligature of a probe caption
    monkeypatch.setattr(probe, "version", lambda library: "9.9" if library == "ftfy" else version(library))
    problem = probe_problem(before, take_probe(encoder), "float32")
    assert problem is not None
    assert f"ftfy: {ftfy.__version__} -> 9.9" in problem


def test_an_edited_chat_template_is_named(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_end|> ")
    tokenizer.save_pretrained(tmp_path)
    texts = [config(place, template={"chat": {}}).identify().fingerprint["chat_text"] for place in (folder, tmp_path)]
    assert texts[0] != texts[1]


def test_an_encoder_without_a_recipe_has_the_fingerprint_it_had(folder: Path) -> None:
    assert set(config(folder).identify().fingerprint) == {
        *("model", "revision", "weights_sha256", "kind", "max_tokens", "output", "compute_dtype"),
        *("tokenizer_sha256", "text_normalisation", "tokenizer", "model_config"),
    }
