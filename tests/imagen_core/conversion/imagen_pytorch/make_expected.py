"""Writes expected.json: what imagen-pytorch's models give for weights and inputs made of their names.

    python -m tests.imagen_core.conversion.imagen_pytorch.make_expected
    python -m tests.imagen_core.conversion.imagen_pytorch.make_expected expected-1.26.3.json

Needs imagen-pytorch (2.1.0, or 1.26.3) installed, without its text encoder and torchvision, which are not used.
"""

import importlib
import json
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.imagen_core.conversion.imagen_pytorch.numbers import (
    LOW_RES_TIME,
    NEXT_TIME,
    SIGMAS,
    TEXT_DIM,
    TIMES,
    inputs,
    trained,
)
from tests.imagen_core.conversion.minimagen.numbers import sampled, weights

UNET: dict[str, Any] = {"dim": 8, "dim_mults": [1, 2], "max_text_len": 6}
RICH: dict[str, Any] = {
    **UNET,
    "num_resnet_blocks": [1, 2],
    "cond_dim": 16,
    "attn_heads": 2,
    "attn_dim_head": 8,
    "layer_attns": [False, True],
    "layer_attns_depth": [1, 2],
    "layer_mid_attns_depth": 2,
    "layer_cross_attns": [True, False],
    "learned_sinu_pos_emb_dim": 8,
    "attn_pool_num_latents": 5,
}
BARE: dict[str, Any] = {
    **UNET,
    "layer_attns": False,
    "layer_cross_attns": False,
    "attend_at_middle": False,
    "attn_pool_text": False,
    "init_cross_embed": False,
    "init_conv_kernel_size": 5,
    "use_global_context_attn": False,
    "scale_skip_connection": False,
    "final_conv_kernel_size": 1,
    "pixel_shuffle_upsample": False,
    "init_conv_to_final_conv_residual": True,
    "combine_upsample_fmaps": True,
}
ENLARGING: dict[str, Any] = {**UNET, "memory_efficient": True, "self_cond": True}
BASE, SUPER = {"image_sizes": [8]}, {"image_sizes": [4, 8]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("original", {"unets": [RICH], **BASE}),
    "base bare": (
        "original",
        {"unets": [BARE], **BASE, "pred_objectives": "v", "noise_schedules": "linear", "loss_type": "l1"},
    ),
    "base without captions": (
        "original",
        {
            "unets": [{**RICH, "attend_at_middle": False}],
            **BASE,
            "condition_on_text": False,
            "pred_objectives": "x_start",
            "min_snr_loss_weight": False,
            "dynamic_thresholding": False,
        },
    ),
    "super": (
        "original",
        {"unets": [{"is_null": True}, ENLARGING], **SUPER, "loss_type": "huber", "lowres_noise_schedule": "cosine"},
    ),
    "elucidated base": ("elucidated", {"unets": [RICH], **BASE, "num_sample_steps": 3, "S_churn": 1}),
    "elucidated super": (
        "elucidated",
        {"unets": [{"is_null": True}, ENLARGING], **SUPER, "num_sample_steps": [4, 3], "sigma_data": 0.7},
    ),
}


def imagen_pytorch() -> Any:
    """The module with its configurations."""
    importlib.import_module("datasets")  # it looks for torchvision
    for name in ("torchvision", "torchvision.transforms", "kornia", "kornia.augmentation", "imagen_pytorch.t5"):
        sys.modules[name] = types.ModuleType(name)
    for outer, inner in (("torchvision", "transforms"), ("kornia", "augmentation")):
        setattr(sys.modules[outer], inner, sys.modules[f"{outer}.{inner}"])
    sys.modules["torchvision"].utils = None  # type: ignore[attr-defined]
    t5: Any = sys.modules["imagen_pytorch.t5"]
    t5.DEFAULT_T5_NAME, t5.t5_encode_text, t5.get_encoded_dim = "google/t5-v1_1-base", print, lambda name: TEXT_DIM
    return importlib.import_module("imagen_pytorch.configs")


def build(kind: str, settings: dict[str, Any], configs: Any) -> tuple[Any, Any, dict[str, list[int]]]:
    """A cascade, its UNet with weights, and their shapes."""
    config = configs.ElucidatedImagenConfig if kind == "elucidated" else configs.ImagenConfig
    imagen = config(**settings).create()
    imagen.cond_drop_prob = 0.0
    unet = imagen.unets[trained(settings)].eval()
    shapes = {name: list(values.shape) for name, values in unet.state_dict().items()}
    unet.load_state_dict(weights(shapes))
    return imagen, unet, shapes


@contextmanager
def given_noise(*values: Tensor) -> Iterator[None]:
    """torch's normal numbers, one call after the other."""
    left = list(values)

    def take(*_: Any, **__: Any) -> Tensor:
        return left.pop(0)

    with mock.patch.object(torch, "randn_like", take), mock.patch.object(torch, "randn", take):
        yield


def conditions(imagen: Any, settings: dict[str, Any], given: dict[str, Tensor]) -> tuple[dict[str, Any], ...]:
    """Arguments with the captions, and with the noisy low-resolution images."""
    text = {}
    if settings.get("condition_on_text", True):
        text = {"text_embeds": given["text"], "text_mask": given["mask"]}
    if not trained(settings):
        return text, {}
    times = torch.full((2,), LOW_RES_TIME)
    larger = imagen.resize_to(given["low_res"], given["x0"].shape[-1])
    noisy = imagen.lowres_noise_schedule.q_sample(larger, times, noise=given["low_res_noise"])[0]
    return text, {"lowres_cond_img": noisy, "lowres_noise_times": times}


def original(imagen: Any, unet: Any, settings: dict[str, Any]) -> dict[str, Tensor]:
    """The network's output, the loss, and a step of sampling."""
    given, index = inputs(settings), trained(settings)
    text, low_res = conditions(imagen, settings, given)
    scheduler, objective = imagen.noise_schedulers[index], imagen.pred_objectives[index]
    times = torch.tensor(TIMES)
    noisy = scheduler.q_sample(given["x0"], times, noise=given["noise"])[0]
    small = imagen.resize_to(given["low_res"], given["x0"].shape[-1])
    results = outputs(unet, noisy, scheduler.get_condition(times), text, low_res, imagen, given)
    with given_noise(given["low_res_noise"]), mock.patch.object(imagen_random(), "random", return_value=1.0):
        results["loss"] = imagen.p_losses(
            unet,
            (given["x0"] + 1) / 2,
            times,
            noise_scheduler=scheduler,
            lowres_cond_img=(small + 1) / 2 if low_res else None,
            lowres_aug_times=low_res.get("lowres_noise_times"),
            noise=given["noise"],
            pred_objective=objective,
            min_snr_gamma=imagen.min_snr_gamma[index],
            **text,
        )[None]
    last = torch.full((2,), TIMES[1])
    with given_noise(given["step_noise"][0]):
        results["step"] = imagen.p_sample(
            unet,
            scheduler.q_sample(given["x0"], last, noise=given["noise"])[0],
            last,
            noise_scheduler=scheduler,
            t_next=torch.full((2,), NEXT_TIME),
            pred_objective=objective,
            dynamic_threshold=imagen.dynamic_thresholding[index],
            **text,
            **low_res,
        )[0]
    return results


def imagen_random() -> Any:
    """The module that decides by `random` whether a network reads its own estimate."""
    return sys.modules["imagen_pytorch.imagen_pytorch"]


def elucidated(imagen: Any, unet: Any, settings: dict[str, Any]) -> dict[str, Tensor]:
    """The network's output, the loss, and all steps of sampling."""
    given, index = inputs(settings), trained(settings)
    text, low_res = conditions(imagen, settings, given)
    sigmas, data = torch.tensor(SIGMAS), imagen.hparams[index].sigma_data
    noisy = given["x0"] + sigmas[:, None, None, None] * given["noise"]
    scaled = imagen.c_in(data, sigmas[:, None, None, None]) * noisy
    results = outputs(unet, scaled, imagen.c_noise(sigmas), text, low_res, imagen, given)
    imagen.noise_distribution = lambda *_: sigmas
    imagen.lowres_noise_schedule.sample_random_times = lambda batch, device: torch.full((batch,), LOW_RES_TIME)
    noises = [given["low_res_noise"], given["noise"]] if low_res else [given["noise"]]
    module = sys.modules["imagen_pytorch.elucidated_imagen"]
    with given_noise(*noises), mock.patch.object(module, "random", return_value=1.0):
        images = (given["x0"] + 1) / 2
        captions = {"text_embeds": given["text"], "text_masks": given["mask"]}
        results["loss"] = imagen(images, unet=unet, unet_number=index + 1, **captions)[None]
    if low_res:
        low_res["lowres_noise_times"] = imagen.lowres_noise_schedule.get_condition(low_res["lowres_noise_times"])
    with given_noise(*given["step_noise"]):
        shape = given["x0"].shape
        images = imagen.one_unet_sample(unet, shape, unet_number=index + 1, use_tqdm=False, **text, **low_res)
    results["sample"] = images * 2 - 1
    return results


def outputs(
    unet: Any, x: Tensor, c_noise: Tensor, text: dict[str, Any], low_res: dict[str, Any], imagen: Any, given: Any
) -> dict[str, Tensor]:
    more = dict(low_res)
    if more:
        more["lowres_noise_times"] = imagen.lowres_noise_schedule.get_condition(more["lowres_noise_times"])
    if unet.self_cond:
        more["self_cond"] = given["estimate"]
    return {
        what: unet(x, c_noise, cond_drop_prob=dropped, **text, **more)
        for what, dropped in (("with_caption", 0.0), ("without_caption", 1.0))
    }


def main(name: str = "expected.json") -> None:
    configs, cases = imagen_pytorch(), {}
    for case, (kind, settings) in CASES.items():
        if name != "expected.json" and case not in ("base bare", "super"):
            continue
        imagen, unet, shapes = build(kind, settings, configs)
        with torch.no_grad():
            results = (elucidated if kind == "elucidated" else original)(imagen, unet, settings)
        rounded = {
            what: [float(f"{value:.7g}") for value in sampled(values).tolist()] for what, values in results.items()
        }
        cases[case] = {"kind": kind, "imagen": settings, "shapes": shapes, **rounded}
    path = Path(__file__).with_name(name)
    path.write_text(json.dumps(cases, separators=(",", ":")).replace('},"', '},\n"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
