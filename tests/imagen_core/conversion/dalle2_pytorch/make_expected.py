"""Writes prior.json: what DALLE2-pytorch's models give for weights and inputs made of their names.

    python -m tests.imagen_core.conversion.dalle2_pytorch.make_expected

Needs DALLE2-pytorch (1.15.6) installed, without CLIP, torchvision and trainers, which are not used.
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
from torch import Tensor

from tests.imagen_core.conversion.dalle2_pytorch.numbers import DIM, STEPS, prior_inputs, weights
from tests.imagen_core.conversion.imagen_pytorch.make_expected import given_noise

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


def rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.7g}") for value in values.flatten().tolist()]


def main() -> None:
    module = dalle2_pytorch()
    with torch.no_grad():
        cases = {case: prior(settings, module) for case, settings in PRIORS.items()}
    path = Path(__file__).with_name("prior.json")
    path.write_text(json.dumps(cases, separators=(",", ":")).replace('},"', '},\n"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
