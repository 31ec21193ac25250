"""Writes prior.json and decoder.json: what DALLE2-pytorch's models give for weights and inputs made of their names.

    python -m tests.imagen_core.conversion.dalle2_pytorch.make_expected
    python -m tests.imagen_core.conversion.dalle2_pytorch.make_expected prior-1.0.1.json    (or 1.8.4, 1.9.0)

Needs DALLE2-pytorch (1.15.6, or the version of a prior) installed, without CLIP, torchvision and trainers, which are
not used.
"""

import importlib
import importlib.util
import json
import random
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tests.imagen_core.conversion.dalle2_pytorch.numbers import DIM, STEPS, decoder_inputs, prior_inputs, weights
from tests.imagen_core.conversion.imagen_pytorch.make_expected import given_noise
from tests.imagen_core.conversion.minimagen.numbers import sampled

NET: dict[str, Any] = {"dim": DIM, "depth": 2, "dim_head": 8, "heads": 2, "max_text_len": 6}
PRIORS: dict[str, dict[str, Any]] = {
    "steps": {
        "net": {**NET, "num_timesteps": 20, "normformer": True, "ff_dropout": 0.05, "attn_dropout": 0.05},
        "timesteps": 20,
    },
    "sinusoids, several tokens, v": {
        "net": {
            **NET,
            "num_time_embeds": 2,
            "num_image_embeds": 3,
            "num_text_embeds": 2,
            "self_cond": True,
            "rotary_emb": False,
        },
        "timesteps": 40,
        "predict_v": True,
        "beta_schedule": "linear",
        "loss_type": "huber",
    },
    "without tokens of captions, clamped": {
        "net": {**NET, "norm_out": False, "final_proj": False},
        "timesteps": 20,
        "condition_on_text_encodings": False,
        "sampling_clamp_l2norm": True,
        "training_clamp_l2norm": True,
        "image_embed_scale": 3.0,
        "loss_type": "l1",
        "beta_schedule": "sigmoid",
    },
}
UNET: dict[str, Any] = {
    "dim": 8,
    "dim_mults": [1, 2],
    "image_embed_dim": DIM,
    "cond_dim": 12,
    "attn_heads": 2,
    "attn_dim_head": 8,
    "max_text_len": 6,
}
RICH: dict[str, Any] = {
    **UNET,
    "num_resnet_blocks": [1, 2],
    "self_attn": [False, True],
    "cond_on_text_encodings": True,
    "text_embed_dim": DIM,
    "num_image_tokens": 3,
}
OTHER: dict[str, Any] = {
    **UNET,
    "num_resnet_blocks": 1,
    "self_cond": True,
    "init_cross_embed": False,
    "resnet_weight_standardization": True,
    "scale_skip_connection": True,
    "pixel_shuffle_upsample": False,
    "final_conv_kernel_size": 3,
}
ENLARGING: dict[str, Any] = {
    "dim": 8,
    "dim_mults": [1, 2],
    "num_resnet_blocks": 1,
    "self_cond": True,
    "max_text_len": 6,
    "memory_efficient": True,
    "cross_embed_downsample": True,
}
DECODERS: dict[str, dict[str, Any]] = {
    "base": {"unets": [RICH], "image_size": 8, "timesteps": 20},
    "base with other options": {
        "unets": [OTHER],
        "image_sizes": [8],
        "timesteps": 40,
        "beta_schedule": "linear",
        "loss_type": "l1",
        "learned_variance_constrain_frac": True,
        "vb_loss_weight": 0.5,
        "use_dynamic_thres": True,
        "p2_loss_weight_gamma": 0.5,
        "p2_loss_weight_k": 2,
    },
    "super": {
        "unets": [UNET, ENLARGING],
        "image_sizes": [4, 8],
        "timesteps": 40,
        "loss_type": "huber",
        "predict_v": [False, True],
    },
    "unconditional": {
        "unets": [{**UNET, "num_resnet_blocks": 1}],
        "image_size": 8,
        "timesteps": 20,
        "unconditional": True,
        "learned_variance": False,
        "predict_x_start": True,
    },
}


class NoVae(nn.Module):
    """What stands for the autoencoder of a decoder that has none."""

    def __init__(self, *, channels: int):
        super().__init__()
        self.encoded_dim = channels

    def copy_for_eval(self) -> "NoVae":
        return self


def dalle2_pytorch() -> Any:
    """The module with the models; what else it imports is left out."""
    absent = {
        "torchvision": (),
        "torchvision.transforms": (),
        "kornia": ("augmentation",),
        "kornia.augmentation": (),
        "kornia.filters": ("gaussian_blur2d",),
        "resize_right": ("resize",),
        "dalle2_pytorch.tokenizer": ("tokenizer",),
        "dalle2_pytorch.vqgan_vae": ("NullVQGanVAE", "VQGanVAE"),
        "x_clip": ("CLIP",),
        "coca_pytorch": ("CoCa",),
    }
    spec = importlib.util.find_spec("dalle2_pytorch")
    assert spec is not None
    sys.modules["dalle2_pytorch"] = types.ModuleType("dalle2_pytorch")
    sys.modules["dalle2_pytorch"].__path__ = list(spec.submodule_search_locations or ())
    for name, parts in absent.items():
        module = sys.modules[name] = types.ModuleType(name)
        for part in parts:
            setattr(module, part, type(part, (), {}))
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]
    sys.modules["dalle2_pytorch.vqgan_vae"].NullVQGanVAE = NoVae  # type: ignore[attr-defined]
    return importlib.import_module("dalle2_pytorch.dalle2_pytorch")


def prior(settings: dict[str, Any], module: Any) -> dict[str, Any]:
    """The network's output with and without a caption, the loss, and a step of sampling."""
    net = module.DiffusionPriorNetwork(**settings["net"])
    options = {name: value for name, value in settings.items() if name != "net"}
    model = module.DiffusionPrior(net, image_embed_dim=DIM, **options).eval()
    shapes = {name: list(values.shape) for name, values in net.state_dict().items()}
    net.load_state_dict(weights(shapes))
    given, times, scheduler = prior_inputs(), torch.tensor(STEPS), model.noise_scheduler
    condition = {"text_embed": given["text_embed"]}
    if model.condition_on_text_encodings:
        condition["text_encodings"] = given["text"]
    x0 = given["x0"] * model.image_embed_scale / DIM**0.5
    noisy = scheduler.q_sample(x0, times, noise=given["noise"])
    estimate = {"self_cond": given["estimate"]} if net.self_cond else {}
    results = {
        "with_caption": net(noisy, times, **condition, **estimate),
        "without_caption": net(noisy, times, text_cond_drop_prob=1.0, **condition, **estimate),
        "without_embedding": net(noisy, times, image_cond_drop_prob=1.0, **condition, **estimate),
    }
    with mock.patch.object(random, "random", return_value=1.0):
        results["loss"] = model.p_losses(x0, times, condition, noise=given["noise"])[None]
    with given_noise(given["step_noise"]):
        last = torch.full((2,), STEPS[1])
        x = scheduler.q_sample(x0, last, noise=given["noise"])
        results["step"] = model.p_sample(x, last, text_cond=condition)[0]
    return {"settings": settings, "shapes": shapes, **{what: rounded(values) for what, values in results.items()}}


def old_prior(module: Any) -> dict[str, Any]:
    """The same of a network of an earlier version, without what it drops or estimates."""
    settings = PRIORS["steps"]
    net = module.DiffusionPriorNetwork(**settings["net"]).eval()
    shapes = {name: list(values.shape) for name, values in net.state_dict().items()}
    net.load_state_dict(weights(shapes))
    given = prior_inputs()
    scheduler = module.NoiseScheduler(beta_schedule="cosine", timesteps=settings["timesteps"], loss_type="l2")
    noisy = scheduler.q_sample(given["x0"], torch.tensor(STEPS), noise=given["noise"])
    with torch.no_grad():
        output = net(noisy, torch.tensor(STEPS), text_embed=given["text_embed"], text_encodings=given["text"])
    return {"settings": settings, "shapes": shapes, "with_caption": rounded(output)}


def decoder(settings: dict[str, Any], module: Any) -> dict[str, Any]:
    """The same of the last UNet of a decoder."""
    options = {name: value for name, value in settings.items() if name != "unets"}
    model = module.Decoder(tuple(module.Unet(**unet) for unet in settings["unets"]), **options).eval()
    model.image_cond_drop_prob = model.text_cond_drop_prob = 0.0
    unet, scheduler = model.unets[-1], model.noise_schedulers[-1]
    shapes = {name: list(values.shape) for name, values in unet.state_dict().items()}
    unet.load_state_dict(weights(shapes))
    given, times = decoder_inputs(), torch.tensor(STEPS)
    condition = {"image_embed": None if model.unconditional else given["image_embed"]}
    if unet.cond_on_text_encodings:
        condition["text_encodings"] = given["text"]
    low_res = {}
    if unet.lowres_cond:
        low_res["lowres_cond_img"] = module.resize_image_to(given["low_res"], 8, nearest=True)
    more = low_res | ({"self_cond": given["estimate"]} if unet.self_cond else {})
    noisy = scheduler.q_sample(given["x0"], times, noise=given["noise"])
    results = {
        "with_caption": unet(noisy, times, **condition, **more),
        "without_caption": unet(noisy, times, text_cond_drop_prob=1.0, **condition, **more),
        "without_embedding": unet(noisy, times, image_cond_drop_prob=1.0, **condition, **more),
    }
    objective = {name: getattr(model, name)[-1] for name in ("predict_x_start", "predict_v", "learned_variance")}
    with mock.patch.object(random, "random", return_value=1.0):
        small = {name: (image + 1) / 2 for name, image in low_res.items()}
        options = {"noise": given["noise"], "noise_scheduler": scheduler, **condition, **small, **objective}
        results["loss"] = model.p_losses(unet, (given["x0"] + 1) / 2, times, **options)[None]
    with given_noise(given["step_noise"]):
        last = torch.full((2,), STEPS[1])
        x = scheduler.q_sample(given["x0"], last, noise=given["noise"])
        options = {"noise_scheduler": scheduler, **condition, **low_res, **objective}
        results["step"] = model.p_sample(unet, x, last, **options)[0]
    found = {what: rounded(sampled(values)) for what, values in results.items()}
    return {"settings": settings, "shapes": shapes, **found}


def rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.7g}") for value in values.flatten().tolist()]


def main(old: str | None = None) -> None:
    module = dalle2_pytorch()
    if old is not None:
        Path(__file__).with_name(old).write_text(json.dumps(old_prior(module), separators=(",", ":")) + "\n")
        return
    for name, run, models in (("prior", prior, PRIORS), ("decoder", decoder, DECODERS)):
        with torch.no_grad():
            cases = {case: run(settings, module) for case, settings in models.items()}
        path = Path(__file__).with_name(f"{name}.json")
        path.write_text(json.dumps(cases, separators=(",", ":")).replace('},"', '},\n"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
