"""Writes expected.json: what ADM's UNets give for weights and inputs made of their names, and how many parameters the
published ones have.

    python -m tests.imagen_core.conversion.adm.make_expected GUIDED IMPROVED FORK

These are checkouts of github.com/openai/guided-diffusion (22e0df8), openai/improved-diffusion (1bc7bbb) and
nostalgebraist/improved-diffusion (a2bb3fc), which run as they are; nothing is installed. What the last imports for
models with text is replaced by nothing.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
from torch import Tensor

from stages.checkpoints.import_adm import parse_flags
from tests.imagen_core.conversion.adm.numbers import STEP, inputs, sampled
from tests.imagen_core.conversion.minimagen.numbers import weights

GUIDED, IMPROVED, FORK = range(3)
PACKAGES = ("guided_diffusion", "improved_diffusion", "improved_diffusion")
TEXT_PACKAGES = ("x_transformers", "x_transformers.x_transformers", "rotary_embedding_torch", "clip", "tokenizers")
TEXT_PACKAGES += ("axial_positional_embedding", "transformer_utils", "transformer_utils.partial_forward", "blobfile")
TEXT_PACKAGES += ("mpi4py", "tokenizers.models", "tokenizers.processors", "kornia", "imagesize", "torchvision")
TEXT_PACKAGES += ("torchvision.transforms", "torchvision.transforms.functional")
SMALL = "--num_channels 32 --num_res_blocks 1"
CASES: dict[str, tuple[int, int, str]] = {  # checkout, side of the images, flags
    "class-conditional": (
        GUIDED,
        16,
        f"{SMALL} --image_size 64 --attention_resolutions 32,16,8 --class_cond True --dropout 0.1 --learn_sigma True "
        "--noise_schedule cosine --num_head_channels 16 --resblock_updown True --use_new_attention_order True "
        "--use_fp16 True",
    ),
    "of 512 pixels": (
        GUIDED,
        128,
        "--num_channels 64 --num_res_blocks 1 --image_size 512 --attention_resolutions 32,16 "
        "--num_head_channels 32 --resblock_updown True",
    ),
    "heads by number": (
        GUIDED,
        16,
        f"{SMALL} --image_size 16 --channel_mult 1,2 --attention_resolutions 16,8 --num_heads 4 "
        "--num_heads_upsample 2 --use_scale_shift_norm False --use_checkpoint True",
    ),
    "ordered by kind": (
        GUIDED,
        16,
        f"{SMALL} --image_size 16 --channel_mult 1,2 --attention_resolutions 8 --num_heads 2 "
        "--use_new_attention_order True --predict_xstart True --timestep_respacing ddim25 --use_ddim True",
    ),
    "bound": (
        GUIDED,
        16,
        f"{SMALL} --image_size 16 --channel_mult 1,1 --attention_resolutions 8 --learn_sigma True --use_kl True "
        "--timestep_respacing 10,15,25",
    ),
    "upsampler": (
        GUIDED,
        16,
        f"{SMALL} --large_size 64 --small_size 16 --attention_resolutions 32,16 --class_cond True --learn_sigma True "
        "--num_head_channels 32 --resblock_updown True --timestep_respacing 250",
    ),
    "improved": (
        IMPROVED,
        16,
        f"{SMALL} --image_size 32 --learn_sigma True --dropout 0.3 --diffusion_steps 4000 --noise_schedule cosine "
        "--rescale_timesteps True --rescale_learned_sigmas True",
    ),
    "improved without rescaling": (
        IMPROVED,
        16,
        f"{SMALL} --image_size 32 --learn_sigma True --class_cond True --diffusion_steps 2000 --num_heads_upsample 1 "
        "--rescale_timesteps False --rescale_learned_sigmas False --timestep_respacing 100",
    ),
    "improved with a fixed variance": (
        IMPROVED,
        16,
        f"{SMALL} --image_size 32 --attention_resolutions 16 --num_heads 1 --use_scale_shift_norm False "
        "--sigma_small True",
    ),
    "improved upsampler": (
        IMPROVED,
        16,
        f"{SMALL} --large_size 64 --small_size 16 --learn_sigma True --diffusion_steps 4000 --rescale_timesteps True "
        "--rescale_learned_sigmas False",
    ),
    "of the fork": (
        FORK,
        16,
        f"{SMALL} --image_size 64 --channel_mult 1,2,2 --attention_resolutions 32,16 --learn_sigma True --num_heads 2 "
        "--channels_per_head 16 --resblock_updown True --noise_schedule cosine --use_checkpoint_up True "
        "--use_v_loss True",
    ),
    "of the fork, balanced": (
        FORK,
        16,
        f"{SMALL} --image_size 32 --channel_mult 1.0,1.5 --num_channels 64 --attention_resolutions 32,16 "
        "--learn_sigma True --use_balanced_loss True --vb_loss_ratio 500.0 --num_heads_upsample 2 --monochrome True "
        "--diffusion_steps 500 --timestep_respacing 50",
    ),
    "upsampler of the fork": (
        FORK,
        16,
        f"{SMALL} --large_size 64 --small_size 16 --channel_mult 1,2 --attention_resolutions 32 --learn_sigma True "
        "--up_interp_mode bicubic --channels_per_head 8 --channels_per_head_upsample 0 --num_heads_upsample 2 "
        "--class_cond True",
    ),
}
_ADM = "--learn_sigma True --resblock_updown True --use_fp16 True --use_scale_shift_norm True --diffusion_steps 1000"
_256 = f"{_ADM} --attention_resolutions 32,16,8 --image_size 256 --noise_schedule linear --num_channels 256 "
_256 += "--num_head_channels 64 --num_res_blocks 2"
_LSUN = "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
_LSUN += "--use_scale_shift_norm False --attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear "
_LSUN += "--rescale_learned_sigmas False --rescale_timesteps False"
_4000 = "--learn_sigma True --diffusion_steps 4000 --rescale_learned_sigmas {0} --rescale_timesteps {0}"
PUBLISHED: dict[str, tuple[int, str]] = {  # checkout, and flags as in its README
    "64x64_diffusion": (
        GUIDED,
        f"{_ADM} --attention_resolutions 32,16,8 --class_cond True --dropout 0.1 --image_size 64 --noise_schedule "
        "cosine --num_channels 192 --num_head_channels 64 --num_res_blocks 3 --use_new_attention_order True",
    ),
    "128x128_diffusion": (
        GUIDED,
        f"{_ADM} --attention_resolutions 32,16,8 --class_cond True --image_size 128 --noise_schedule linear "
        "--num_channels 256 --num_heads 4 --num_res_blocks 2",
    ),
    "256x256_diffusion": (GUIDED, f"{_256} --class_cond True"),
    "256x256_diffusion_uncond": (GUIDED, f"{_256} --class_cond False"),
    "512x512_diffusion": (GUIDED, f"{_256} --class_cond True --image_size 512"),
    "64_256_upsampler": (
        GUIDED,
        f"{_ADM} --attention_resolutions 32,16,8 --class_cond True --large_size 256 --small_size 64 --noise_schedule "
        "linear --num_channels 192 --num_heads 4 --num_res_blocks 2",
    ),
    "128_512_upsampler": (
        GUIDED,
        f"{_ADM} --attention_resolutions 32,16 --class_cond True --large_size 512 --small_size 128 --noise_schedule "
        "linear --num_channels 192 --num_head_channels 64 --num_res_blocks 2",
    ),
    "lsun_bedroom": (GUIDED, f"{_256} --class_cond False --dropout 0.1"),
    "imagenet64_uncond_100M_1500K": (
        IMPROVED,
        f"--image_size 64 --num_channels 128 --num_res_blocks 3 --noise_schedule cosine {_4000.format(True)}",
    ),
    "cifar10_uncond_50M_500K": (
        IMPROVED,
        "--image_size 32 --num_channels 128 --num_res_blocks 3 --dropout 0.3 --noise_schedule cosine "
        f"{_4000.format(True)}",
    ),
    "imagenet64_cond_270M_250K": (
        IMPROVED,
        "--image_size 64 --num_channels 192 --num_res_blocks 3 --class_cond True --noise_schedule cosine "
        f"{_4000.format(False)}",
    ),
    "upsample_cond_500K": (
        IMPROVED,
        "--large_size 256 --small_size 64 --num_channels 192 --num_res_blocks 2 --class_cond True --noise_schedule "
        f"linear {_4000.format(False)}",
    ),
    "lsun_uncond_100M_1200K_bs128": (IMPROVED, _LSUN),
}


def script_util(checkout: int) -> Any:
    """The module of a checkout that makes models."""
    for name in [name for name in sys.modules if name.startswith(PACKAGES)]:
        del sys.modules[name]
    missing = {name: mock.MagicMock() for name in TEXT_PACKAGES} if checkout == FORK else {}
    with mock.patch.object(sys, "path", [sys.argv[1 + checkout], *sys.path]), mock.patch.dict(sys.modules, missing):
        return importlib.import_module(f"{PACKAGES[checkout]}.script_util")


def build(checkout: int, text: str) -> tuple[Any, Any, dict[str, Any]]:
    """A model, its diffusion, and all settings."""
    module = script_util(checkout)
    flags = dict(parse_flags(text))
    kind = "sr_" if "large_size" in flags else ""
    settings = getattr(module, f"{kind}model_and_diffusion_defaults")()
    for name, value in flags.items():
        if name in settings:
            default = settings[name]
            settings[name] = value == "True" if isinstance(default, bool) else type(default)(value)
    settings["use_fp16"] = False
    settings = {name: value for name, value in settings.items() if name != "use_fp16" or checkout == GUIDED}
    with mock.patch.object(numpy, "product", numpy.prod, create=True):  # its name before NumPy 2
        return *getattr(module, f"{kind}create_model_and_diffusion")(**settings), settings


def conditions(flags: dict[str, str], given: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = {"y": given["labels"]} if flags.get("class_cond") == "True" else {}
    return labels | ({"low_res": given["low_res"]} if "large_size" in flags else {})


def expected(checkout: int, side_px: int, text: str) -> dict[str, Any]:
    """The results of one model: output, loss, and a step of ancestral sampling and of DDIM."""
    flags = dict(parse_flags(text))
    net, spaced, settings = build(checkout, text)
    _, diffusion, _ = build(checkout, text + " --timestep_respacing=")
    net = net.eval()
    shapes = {name: list(values.shape) for name, values in net.state_dict().items()}
    net.load_state_dict(weights(shapes))
    given = inputs(side_px, diffusion.num_timesteps, net.out_channels // (1 + settings["learn_sigma"]))
    more = conditions(flags, given)
    with torch.no_grad():
        x = diffusion.q_sample(given["x0"], given["steps"], given["noise"])
        if hasattr(diffusion, "_wrap_model"):
            output = diffusion._wrap_model(net)(x, given["steps"], **more)
        else:
            output = net(x, diffusion._scale_timesteps(given["steps"]), **more)
        loss = diffusion.training_losses(net, given["x0"], given["steps"], more, given["noise"])["loss"]
        steps = torch.tensor([int(STEP * spaced.num_timesteps)] * 2)
        x = spaced.q_sample(given["x0"], steps, given["noise"])
        with mock.patch("torch.randn_like", return_value=given["step_noise"]):
            ancestral = spaced.p_sample(net, x, steps, model_kwargs=more)["sample"]
            ddim = spaced.ddim_sample(net, x, steps, model_kwargs=more)["sample"]
    return {
        **({"config": {**settings, "is_super_res": "low_res" in more}} if checkout == FORK else {"flags": text}),
        "side_px": side_px,
        "shapes": shapes,
        "output": _rounded(sampled(output)),
        "loss": _rounded(loss),
        "ancestral": _rounded(sampled(ancestral)),
        "ddim": _rounded(sampled(ddim)),
    }


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def count(checkout: int, text: str) -> dict[str, Any]:
    """Flags of a published model, and how many parameters its class makes."""
    with torch.device("meta"):
        net, *_ = build(checkout, text)
    return {"flags": text, "parameters": sum(values.numel() for values in net.parameters())}


def main() -> None:
    results = {
        "cases": {case: expected(*settings) for case, settings in CASES.items()},
        "published": {name: count(*settings) for name, settings in PUBLISHED.items()},
    }
    text = json.dumps(results, separators=(",", ":")).replace('},"', '},\n"') + "\n"
    Path(__file__).with_name("expected.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
