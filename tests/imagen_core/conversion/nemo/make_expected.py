"""Writes expected.json: what NeMo's models estimate for weights and inputs made of their names.

    python -m tests.imagen_core.conversion.nemo.make_expected NEMO

NEMO is the unpacked source of nemo_toolkit 1.23.0 (the folder with nemo/ in it), which need not be installed: only its
UNets and their preconditioning run, with torch's group norm in place of apex's.
"""

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.imagen_core.conversion.minimagen.numbers import sampled
from tests.imagen_core.conversion.nemo.numbers import LOW_RES_LEVEL, SIGMAS, TIMES, inputs, weights

EDM = {"preconditioning_type": "EDM", "preconditioning": {"loss_type": "l2", "sigma_data": 0.5}}
DDPM: dict[str, Any] = {
    "preconditioning_type": "DDPM",
    "preconditioning": {"pred_objective": "noise", "noise_schedule": "cosine", "timesteps": 20},
}
CONDITIONING = {"conditioning": {"embed_dim": 32, "token_length": 6, "drop_rate": 0.1}}
_COMMON: dict[str, Any] = {
    "embed_dim": 32,
    "image_size": 8,
    "channel_mult": [1, 2],
    "per_head_channels": 16,
    "learned_sinu_pos_emb_dim": 0,
    "stable_attention": False,
}
REGULAR = {**_COMMON, "num_res_blocks": 1, "cond_dim": 64, "attention_resolutions": [4]}
EFFICIENT = {**_COMMON, "num_resblocks": [1, 2], "atnn_enabled_at": [0, 1], "skip_connection_scaling": True}


def base(diffusion: dict[str, Any], **unet: Any) -> dict[str, Any]:
    return {"unet_type": "base", "unet": {**REGULAR, **unet}, **diffusion, **CONDITIONING}


def enlarging(diffusion: dict[str, Any], *, noise: bool, **unet: Any) -> dict[str, Any]:
    settings = {**REGULAR, "low_res_cond": True, **unet}
    return {"unet_type": "sr-unet", "unet": settings, "noise_cond_aug": noise, **diffusion, **CONDITIONING}


def efficient(diffusion: dict[str, Any], *, noise: bool, **unet: Any) -> dict[str, Any]:
    return {
        "unet_type": "sr",
        "unet": {**EFFICIENT, **unet},
        "noise_cond_aug": noise,
        **diffusion,
        **CONDITIONING,
    }


LEARNED = {"use_null_token": True, "feature_pooling_type": "mean", "learned_sinu_pos_emb_dim": 8}
LINEAR = {**DDPM, "preconditioning": {**DDPM["preconditioning"], "noise_schedule": "linear"}}
TO_START = {**DDPM, "preconditioning": {**DDPM["preconditioning"], "pred_objective": "x_start"}}
CASES = {
    "base fused": base(EDM, num_res_blocks=[1, 2]),
    "base stacked": base(DDPM, attention_type="stacked", stable_attention=True),
    "base null token, mean, learned time": base(
        LINEAR, **LEARNED, resample_with_conv=False, attention_resolutions=[3], dropout=0.1
    ),
    "base resolution in ResBlocks": base(TO_START, resblock_updown=True, scale_shift_norm=False),
    "sr-unet with noise": enlarging(EDM, noise=True),
    "sr-unet stacked": enlarging(EDM, noise=False, attention_type="stacked", use_null_token=True),
    "sr fused with noise": efficient(EDM, noise=True),
    "sr cross": efficient(DDPM, noise=False, attention_type="cross", feature_pooling_type="mean"),
    "sr stacked": efficient(EDM, noise=True, attention_type="stacked", per_head_channels=-1, num_attn_heads=4),
    "sr self": efficient(EDM, noise=False, attention_type="self", skip_connection_scaling=False),
    "sr addition, larger first kernel": efficient(EDM, noise=False, scale_shift_norm=False, init_conv_kernel_size=7),
}


class GroupNorm(nn.GroupNorm):
    """Apex's, without an activation in it."""

    def __init__(self, num_groups: int, num_channels: int, act: str = ""):
        super().__init__(num_groups, num_channels)
        assert not act


def nemo(root: str) -> tuple[Any, Any]:
    """The modules with the UNets and with their preconditioning; what else NeMo imports is left out."""
    package = "nemo.collections.multimodal"
    parts = ("modules.imagen.diffusionmodules", "modules.imagen.sampler", "models.text_to_image.imagen", "parts")
    names = {"apex", "apex.contrib", "apex.contrib.group_norm", f"{package}.parts.utils"}
    for part in parts:
        words = f"{package}.{part}".split(".")
        names |= {".".join(words[: count + 1]) for count in range(len(words))}
    for name in sorted(names):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(Path(root, *name.split(".")))]
    sys.modules["apex.contrib.group_norm"].GroupNorm = GroupNorm  # type: ignore[attr-defined]
    sys.modules[f"{package}.parts.utils"].randn_like = None  # type: ignore[attr-defined]
    nets = importlib.import_module(f"{package}.modules.imagen.diffusionmodules.nets")
    return nets, importlib.import_module(f"{package}.models.text_to_image.imagen.precond")


def build(model: dict[str, Any], nets: Any, precond: Any) -> tuple[nn.Module, dict[str, list[int]]]:
    """A model with its UNet's weights, and their shapes."""
    noise = model.get("noise_cond_aug", False)
    make = nets.EfficientUNetModel if model["unet_type"] == "sr" else nets.UNetModel
    net = make(**model["unet"], text_embed_dim=model["conditioning"]["embed_dim"], noise_cond_aug=noise).eval()
    shapes = {name: list(values.shape) for name, values in net.state_dict().items()}
    net.load_state_dict(weights(shapes))
    kind = precond.EDMPrecond if model["preconditioning_type"] == "EDM" else precond.ContinousDDPMPrecond
    return kind(unet=net, **model["preconditioning"], noise_cond_aug=noise), shapes


def estimate(model: dict[str, Any], model_of_nemo: Any, given: dict[str, Tensor], text: Tensor) -> Tensor:
    """The clean images that NeMo makes of noisy ones."""
    low_res = {} if model["unet_type"] == "base" else {"x_low_res": given["low_res"]}
    condition = {"text_embed": text, "text_mask": given["mask"].float(), **low_res}
    if model["preconditioning_type"] == "EDM":
        sigma = torch.tensor(SIGMAS)
        model_of_nemo.sample_time = lambda batch_size, device: torch.full((batch_size,), LOW_RES_LEVEL)
        return model_of_nemo(x=given["x0"] + sigma[:, None, None, None] * given["noise"], time=sigma, **condition)
    time = torch.tensor(TIMES)
    noisy = model_of_nemo.scheduler.q_sample(given["x0"], time, given["noise"])[0]
    predicted = model_of_nemo(x=noisy, time=time, **condition)
    if model_of_nemo.pred_objective == "x_start":
        return predicted
    return model_of_nemo.scheduler.predict_start_from_noise(noisy, time, predicted)


def main(root: str) -> None:
    nets, precond = nemo(root)
    cases = {}
    for case, model in CASES.items():
        model_of_nemo, shapes = build(model, nets, precond)
        given = inputs(model)
        side = given["low_res"].shape[-1]
        precond.randn_like = lambda _, generator, part=given["low_res_noise"][..., :side, :side]: part
        with torch.no_grad():
            outputs = {
                "with_caption": estimate(model, model_of_nemo, given, given["text"]),
                "without_caption": estimate(model, model_of_nemo, given, torch.zeros_like(given["text"])),
            }
        rounded = {what: [round(v, 5) for v in sampled(values).tolist()] for what, values in outputs.items()}
        cases[case] = {"model": model, "shapes": shapes, **rounded}
    path = Path(__file__).with_name("expected.json")
    path.write_text(json.dumps(cases, separators=(",", ":")).replace('},"', '},\n"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
