"""A training that starts with the weights of another."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from imagen_core.diffusion import Denoiser, DenoiserConfig
from imagen_core.models import Conditioning
from imagen_core.train import LoadedDenoiser, TrainError, load_checkpoint, train
from imagen_core.train.checkpoints.init_from import initialize_from
from tests.imagen_core.models.small import random_weights
from tests.imagen_core.train.small import BASE, BASE_UNET, DIM, SUPER, files, make_config, tensors

FROZEN = {"lr": 1e-30, "weight_decay": 0.0, "warmup_steps": 0}


@pytest.fixture(scope="module")
def source(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("source")
    train(make_config(store, num_steps=2), out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "taken"), [(None, "ema-0.9"), ("model", "model"), ("ema-0.5", "ema-0.5")])
def test_a_training_starts_with_the_weights_of_another(
    source: Path, store: Path, tmp_path: Path, weights: str | None, taken: str
) -> None:
    config = make_config(
        store, num_steps=1, optimizer=FROZEN, seed=7, init_from={"path": str(source), "weights": weights}
    )
    started = tensors(train(config, tmp_path)["checkpoint"])
    expected = tensors(sorted((source / "checkpoints").iterdir())[-1])
    names = [name.removeprefix("model/") for name in started if name.startswith("model/")]
    for name in names:
        for part in ("model", "ema-0.9", "ema-0.5"):  # the averages begin with them too
            torch.testing.assert_close(started[f"{part}/{name}"], expected[f"{taken}/{name}"], rtol=1e-12, atol=1e-20)
    report = json.loads((tmp_path / "start.json").read_text())
    assert (report["step"], report["weights"], report["loaded"]) == (2, taken, len(names))
    assert (report["left_random"], report["not_used"]) == ([], [])


def test_tensors_that_do_not_fit_are_skipped_and_listed(source: Path, store: Path, tmp_path: Path) -> None:
    other = make_config(
        store, num_steps=1, optimizer=FROZEN, denoiser=SUPER, init_from={"path": str(source), "mismatch": "skip"}
    )
    started = tensors(train(other, tmp_path)["checkpoint"])
    report = json.loads((tmp_path / "start.json").read_text())
    assert "net.conv_in.weight" in report["left_random"]  # reads the low-resolution image too
    assert any("low_res" in name for name in report["left_random"])
    expected = tensors(sorted((source / "checkpoints").iterdir())[-1])
    shared = [n for n in started if n.startswith("model/") and n.removeprefix("model/") not in report["left_random"]]
    assert len(shared) == report["loaded"] > 10
    for name in shared:
        torch.testing.assert_close(started[name], expected[name.replace("model/", "ema-0.9/")], rtol=1e-12, atol=1e-20)


def test_tensors_that_do_not_fit_are_refused_unless_mismatch_is_skip(
    source: Path, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        TrainError, match=r"tensors do not fit \(net\.conv_in\.weight: .* here, .* there.*init_from\.mismatch=skip"
    ):
        train(make_config(store, denoiser=SUPER, init_from={"path": str(source)}), tmp_path)
    fewer = BASE | {"unet": BASE_UNET | {"text_dim": None, "attention_type": "self"}}
    with pytest.raises(TrainError, match=r"init_from\.mismatch=skip"):
        train(make_config(store, denoiser=fewer, text=None, init_from={"path": str(source)}), tmp_path)
    with pytest.raises(TrainError, match=r"init_from\.path: .*absent: has no checkpoint"):
        train(make_config(store, init_from={"path": str(tmp_path / "absent")}), tmp_path)
    assert not (tmp_path / "start.json").exists()


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_captions_that_are_encoded_in_another_way_are_refused_unless_mismatch_is_skip(
    source: Path, store: Path, tmp_path: Path, lora: object
) -> None:
    def start(out: Path, *, mismatch: str = "error", **recorded: object) -> None:
        def load(path: str, weights: str | None, *_: object) -> LoadedDenoiser:
            loaded = load_checkpoint(Path(path), weights)
            assert isinstance(loaded.encoder, dict)
            fingerprint = {**loaded.encoder["fingerprint"], **recorded}
            return replace(loaded, encoder={**loaded.encoder, "fingerprint": fingerprint})

        init_from = {"path": str(source), "mismatch": mismatch}
        train(make_config(store, num_steps=1, init_from=init_from, lora=lora), out, load=load)

    words = (
        r"init_from\.path .*: captions of 't5' are encoded in another way than those it was trained on: "
        r"cleaning: \[\"deepfloyd\"\] -> \(absent\); pads\.to: 77 -> \(absent\); .*init_from\.mismatch=skip"
    )
    recipe = {"cleaning": ["deepfloyd"], "pads": {"to": 77}}
    with pytest.raises(TrainError, match=words):
        start(tmp_path / "out", **recipe)
    assert not (tmp_path / "out/start.json").exists()
    start(tmp_path / "model", weights_sha256="of another file", max_tokens=3, compute_dtype="float16")
    start(tmp_path / "given", **recipe, kind="given")
    if lora is None:
        start(tmp_path / "skip", **recipe, mismatch="skip")


@pytest.mark.slow
def test_a_resumed_run_does_not_load_initial_weights_again(source: Path, store: Path, tmp_path: Path) -> None:
    straight = train(make_config(store, num_steps=4, init_from={"path": str(source)}), tmp_path / "a")
    train(make_config(store, num_steps=2, init_from={"path": str(source)}), tmp_path / "b")
    resumed = train(make_config(store, num_steps=4, init_from={"path": str(tmp_path / "gone")}), tmp_path / "b")
    assert files(resumed["checkpoint"]) == files(straight["checkpoint"])


@pytest.mark.parametrize(
    ("small", "large", "inputs", "more_inputs"),
    [
        (nn.Linear(3, 2), nn.Linear(5, 4), (4, 3), (4, 2)),
        (nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(4, 5, 7, padding=3), (1, 3, 6, 6), (1, 1, 6, 6)),
        (nn.ConvTranspose2d(3, 2, 4, 2, 1), nn.ConvTranspose2d(6, 5, 4, 2, 1), (1, 3, 6, 6), (1, 3, 6, 6)),
    ],
    ids=["linear", "convolution", "transposed convolution"],
)
def test_the_first_outputs_of_a_grown_layer_are_those_of_the_smaller_one_whatever_the_new_inputs(
    small: nn.Module, large: nn.Module, inputs: tuple[int, ...], more_inputs: tuple[int, ...]
) -> None:
    fresh = {name: values.clone() for name, values in large.state_dict().items()}
    found = grown(small, large)
    assert set(found.grown) == {"weight", "bias"}
    x, more = torch.randn(inputs), torch.randn(more_inputs)
    expected, result = small(x), large(torch.cat([x, more], dim=1))
    torch.testing.assert_close(result[:, : expected.shape[1]], expected, rtol=1e-5, atol=1e-6)
    assert large.bias[expected.shape[1] :].equal(fresh["bias"][expected.shape[1] :])  # type: ignore[index]
    axis = int(isinstance(large, nn.ConvTranspose2d))
    new = [t.transpose(0, axis)[expected.shape[1] :] for t in (large.weight, fresh["weight"])]  # type: ignore[operator]
    assert new[0].equal(new[1])


def grown(small: nn.Module, large: nn.Module, mismatch: str = "grow") -> Any:
    """Initialises the large model with the weights of the small one."""
    loaded = SimpleNamespace(denoiser=small, step=1, weights="model", place="here", sha256="")
    settings: Any = SimpleNamespace(init_from=SimpleNamespace(path="there", weights=None, mismatch=mismatch))
    return initialize_from(large, settings, lambda path, weights: loaded)  # type: ignore[arg-type, return-value]


def test_a_model_with_more_inputs_outputs_classes_and_larger_kernels_computes_what_the_smaller_one_did() -> None:
    def model(**changes: object) -> Denoiser:
        unet = BASE_UNET | {"num_classes": 3} | changes
        return random_weights(Denoiser(DenoiserConfig.model_validate(BASE | {"unet": unet})).double()).eval()

    small = model()
    large = model(num_classes=5, init_kernel_size=7, self_conditioning=True, condition_channels=2, out_channels=6)
    report = grown(small, large)
    assert not report.left_random
    assert {"net.conv_in.weight", "net.conv_out.weight", "net.conv_out.bias"} < set(report.grown)
    text, images = torch.randn(2, 4, DIM).double(), torch.randn(2, 8, 16, 16).double()
    condition = Conditioning(text=text, labels=torch.tensor([2, 0]))
    expected = small.net(images[:, :3], torch.zeros(2).double(), condition)
    more = replace(condition, images=images[:, 3:5], estimate=images[:, 5:])
    torch.testing.assert_close(large.net(images[:, :3], torch.zeros(2).double(), more)[:, :3], expected)


def test_kernels_without_a_common_middle_and_larger_tensors_are_left_random() -> None:
    small, large = nn.Conv2d(4, 2, 4), nn.Conv2d(3, 2, 5)
    assert grown(small, large).left_random == ("weight",)
    with pytest.raises(TrainError, match=r"init_from\.mismatch=skip to leave them random, grow to take smaller"):
        grown(small, large, "error")
    with pytest.raises(TrainError, match=r"2 tensors do not fit .*; check the path"):
        grown(nn.Conv2d(4, 2, 5), nn.Linear(2, 3, bias=False))


def test_a_wider_model_grows_from_a_training_and_trains(source: Path, store: Path, tmp_path: Path) -> None:
    wide = BASE | {"unet": BASE_UNET | {"embed_dim": 64}}
    init = {"path": str(source), "mismatch": "grow"}
    started = tensors(
        train(make_config(store, num_steps=1, optimizer=FROZEN, denoiser=wide, init_from=init), tmp_path)["checkpoint"]
    )
    report = json.loads((tmp_path / "start.json").read_text())
    assert not report["left_random"]
    assert report["loaded"] == len([name for name in started if name.startswith("model/")])
    expected = tensors(sorted((source / "checkpoints").iterdir())[-1])["ema-0.9/net.conv_in.weight"]
    assert started["model/net.conv_in.weight"].shape == (64, 3, 3, 3)
    torch.testing.assert_close(started["model/net.conv_in.weight"][:32], expected, rtol=1e-12, atol=1e-20)
