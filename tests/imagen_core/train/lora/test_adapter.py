"""Adapters in networks of every family."""

import builtins
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from imagen_core.diffusion import AnyDenoiserConfig, Denoiser
from imagen_core.models import Conditioning
from imagen_core.train import LoraConfig, TrainError
from imagen_core.train.lora.adapter import (
    add_new_adapter,
    has_adapter,
    load_adapter,
    merge_adapter,
    saved_parameters,
    target_layers,
)
from tests import tiny_networks
from tests.imagen_core.models.small import captions, efficient, random_weights, regular, transformer
from tests.imagen_core.models.small import inputs as unet_inputs

TEXT_DIM = 12
HYBRID = tiny_networks.HYBRID | {"text_dim": TEXT_DIM, "max_text_tokens": 8, "perceiver": False}
PRIOR = {"kind": "prior", "network": {"dim": 16, "depth": 2, "num_heads": 2, "head_dim": 8}}
FAMILIES: dict[str, dict[str, Any]] = {
    "regular": {"unet": regular(), "size_px": 16},
    "efficient": {"unet": efficient(low_res=False), "size_px": 16},
    "hybrid": {"unet": HYBRID, "size_px": 16},
    "transformer": {"unet": transformer(), "size_px": 16},
    "prior": PRIOR,
}
LORA = LoraConfig(rank=3, alpha=6)


def denoiser(family: str, **changes: Any) -> Denoiser:
    config = TypeAdapter(AnyDenoiserConfig).validate_python(FAMILIES[family] | changes)
    return random_weights(Denoiser(config).double()).eval()


def arguments(family: str) -> tuple[Tensor, Tensor, Conditioning]:
    if family == "prior":
        rows = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return rows, torch.tensor([0.5, 2.0], dtype=torch.float64), Conditioning(text_embed=rows.flip(0))
    text, mask = captions((3, 5), 6, TEXT_DIM, dtype=torch.float64)
    x, _, _ = unet_inputs(regular(), dtype=torch.float64)
    return x, torch.tensor([0.5, 2.0], dtype=torch.float64), Conditioning(text=text, text_mask=mask)


def with_adapter(family: str, config: LoraConfig = LORA, *, filled: bool = True) -> Denoiser:
    model = denoiser(family)
    add_new_adapter(model, config)
    if filled:
        random_weights(nn.ParameterList(saved_parameters(model).values()))
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_new_adapter_changes_nothing_and_a_filled_one_adds_its_product(family: str) -> None:
    plain, given = denoiser(family), arguments(family)
    torch.testing.assert_close(with_adapter(family, filled=False)(*given), plain(*given), rtol=1e-10, atol=1e-14)
    adapted = with_adapter(family)
    values = saved_parameters(adapted)
    assert not torch.allclose(adapted(*given), plain(*given), rtol=1e-3)
    for layer in target_layers(plain, None):
        added = values[f"{layer}.lora_B.weight"] @ values[f"{layer}.lora_A.weight"]
        plain.get_parameter(f"{layer}.weight").add_(6 / 3 * added)
    torch.testing.assert_close(adapted(*given), plain(*given), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_merged_is_unmerged_and_has_the_names_of_the_base(family: str) -> None:
    model, given = with_adapter(family).float(), tuple(each.float() for each in arguments(family)[:2])
    conditioning = arguments(family)[2]
    expected = model(*given, conditioning)
    assert has_adapter(model)
    merge_adapter(model)
    assert not has_adapter(model)
    assert model.state_dict().keys() == denoiser(family).state_dict().keys()
    torch.testing.assert_close(model(*given, conditioning), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_alone_gets_gradients(family: str) -> None:
    model = with_adapter(family)
    model(*arguments(family)).square().sum().backward()
    adapter = {id(parameter) for parameter in saved_parameters(model).values()}
    assert len(adapter) == 2 * len(target_layers(denoiser(family), None)) > 0
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in adapter), name
        assert parameter.grad is None or bool(parameter.grad.abs().sum() > 0), name


@torch.no_grad()
def test_convolutions_have_adapters_of_their_kernel() -> None:
    config = LoraConfig(rank=2, targets=("conv1", "layer.skip"))
    plain, model, given = denoiser("regular"), with_adapter("regular", config), arguments("regular")
    values = saved_parameters(model)
    layers = target_layers(plain, config.targets)
    assert {name.rpartition(".")[2] for name in layers} == {"conv1", "skip"}
    for layer in layers:
        a, b = values[f"{layer}.lora_A.weight"], values[f"{layer}.lora_B.weight"]
        plain.get_parameter(f"{layer}.weight").add_(torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a))
    torch.testing.assert_close(model(*given), plain(*given), rtol=1e-9, atol=1e-9)
    merge_adapter(model)
    torch.testing.assert_close(model(*given), plain(*given), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_scale_is_a_factor_of_what_is_added() -> None:
    model, given = with_adapter("prior"), arguments("prior")
    values = {name: parameter.clone() for name, parameter in saved_parameters(model).items()}
    load_adapter(model, values, scale=0.0)
    torch.testing.assert_close(model(*given), denoiser("prior")(*given), rtol=1e-12, atol=1e-12)
    load_adapter(model, values, scale=0.25)
    quarter = with_adapter("prior", LoraConfig(rank=3, alpha=1.5))
    load_adapter(quarter, values)
    torch.testing.assert_close(model(*given), quarter(*given), rtol=1e-12, atol=1e-12)


def test_alpha_is_the_rank_where_it_is_not_given() -> None:
    assert LoraConfig(rank=8).scale_times_rank == LoraConfig(rank=8, alpha=8).scale_times_rank == 8.0


def test_layers_that_cannot_have_an_adapter_are_refused_by_name() -> None:
    model = denoiser("regular")
    with pytest.raises(TrainError, match=r"lora.targets.1: 'to_x' ends the name of no layer; name some of .*to_q"):
        target_layers(model, ("to_q", "to_x"))
    with pytest.raises(TrainError, match=r"lora.targets.0: 'middle' ends net.middle, which is a ModuleList"):
        target_layers(model, ("middle",))
    with pytest.raises(TrainError, match=r"'layer' ends .*, which is a ResBlock, and LoRA is for linear layers"):
        target_layers(model, ("layer",))
    standardized = denoiser("hybrid", unet=HYBRID | {"weight_standardization": True})
    with pytest.raises(TrainError, match=r"conv2, which is a StandardizedConv2d, and LoRA is for"):
        target_layers(standardized, ("conv2",))


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": 0}, {"targets": []}, {"targets": [""]}])
def test_settings_that_would_train_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        LoraConfig.model_validate(settings)


def test_a_missing_peft_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ModuleNotFoundError("No module named 'peft'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(TrainError, match=r"lora: needs peft; pip install '\.\[lora\]'"):
        add_new_adapter(denoiser("prior"), LORA)
