"""Models of guided-diffusion and improved-diffusion as stages of a cascade: settings, diffusion, and how they sample.

Dhariwal and Nichol 2021 (arXiv 2105.05233), Nichol and Dhariwal 2021 (arXiv 2102.09672). Both keep their settings in
the flags of a command (github.com/openai/guided-diffusion and improved-diffusion, script_util.py), not in a file with
the weights. Their defaults are the same but for two flags, which change nothing at 1000 steps.
"""

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

from imagen_core.conversion.adm_unet import unet_config
from imagen_core.diffusion.config import DenoiserConfig
from imagen_core.diffusion.steps import respaced_steps

_WORDS = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}


def _truth(text: str) -> bool:
    return _WORDS[text.lower()]


_FLAGS: dict[str, tuple[Callable[[str], Any], Any]] = {  # how a flag is read, and its default
    "image_size": (int, 64),
    "large_size": (int, 256),
    "small_size": (int, 64),
    "num_channels": (int, 128),
    "num_res_blocks": (int, 2),
    "num_heads": (int, 4),
    "num_heads_upsample": (int, -1),
    "num_head_channels": (int, -1),
    "attention_resolutions": (str, "16,8"),
    "channel_mult": (str, ""),
    "dropout": (float, 0.0),
    "class_cond": (_truth, False),
    "use_checkpoint": (_truth, False),
    "use_scale_shift_norm": (_truth, True),
    "resblock_updown": (_truth, False),
    "use_new_attention_order": (_truth, False),
    "learn_sigma": (_truth, False),
    "sigma_small": (_truth, False),
    "diffusion_steps": (int, 1000),
    "noise_schedule": (str, "linear"),
    "timestep_respacing": (str, ""),
    "use_kl": (_truth, False),
    "predict_xstart": (_truth, False),
    "rescale_timesteps": (_truth, False),
    "rescale_learned_sigmas": (_truth, False),
    "use_ddim": (_truth, False),
    "clip_denoised": (_truth, True),
}
_WITHOUT_EFFECT = {  # of the commands that train and sample, and of classifiers
    *("use_fp16", "fp16_scale_growth", "data_dir", "schedule_sampler", "lr", "weight_decay", "lr_anneal_steps"),
    *("batch_size", "microbatch", "ema_rate", "log_interval", "save_interval", "resume_checkpoint", "num_samples"),
    *("model_path", "base_samples", "classifier_path", "classifier_scale", "classifier_use_fp16", "classifier_width"),
    *("classifier_depth", "classifier_attention_resolutions", "classifier_use_scale_shift_norm"),
    *("classifier_resblock_updown", "classifier_pool"),
}
_DIFFER = ("rescale_timesteps", "rescale_learned_sigmas")
"""Flags that are true in improved-diffusion, and false in guided-diffusion, where they are not given."""
_MULT = {32: "1,2,2,2", 64: "1,2,3,4", 128: "1,1,2,3,4", 256: "1,1,2,2,4,4", 512: "0.5,1,1,2,2,4,4"}
_LOW_RES_MULT = {size: mult for size, mult in _MULT.items() if size in (64, 256)} | {512: "1,1,2,2,4,4"}
"""channel_mult by the side of the images, where it is not given."""


def settings_of_flags(flags: Mapping[str, str], *, low_res: bool) -> dict[str, Any]:
    """All settings of a model, with defaults for flags that are not given.

    Args:
        flags: by name, without dashes.
        low_res: whether it upsamples images.
    Raises:
        ValueError: a flag is unknown, has no such value, or has another default in each of the two systems.
    """
    others = {"large_size", "small_size"} if not low_res else {"image_size"}
    for name, value in flags.items():
        if name not in _FLAGS and name not in _WITHOUT_EFFECT:
            raise ValueError(f"{name}: not a flag of guided-diffusion or improved-diffusion known here")
        if name in others:
            does = "upsamples images, which have large_size and small_size" if low_res else "does not upsample images"
            raise ValueError(f"{name} is {value}, but by its first convolution the model {does}")
    settings = {name: _read(name, flags[name]) if name in flags else default for name, (_, default) in _FLAGS.items()}
    steps = settings["diffusion_steps"]
    needed = _DIFFER if settings["learn_sigma"] and not settings["use_kl"] else _DIFFER[:1]
    missing = [name for name in needed if name not in flags and steps != 1000]
    if missing:
        raise ValueError(
            f"{missing[0]} is not given, which matters with diffusion_steps {steps}: say True, improved-diffusion's "
            "default, or False, guided-diffusion's"
        )
    settings["image_size"] = size = settings["large_size" if low_res else "image_size"]
    known = _LOW_RES_MULT if low_res else _MULT
    if not settings["channel_mult"] and size not in known:
        raise ValueError(f"channel_mult is not given, and has no default for {size} pixels, only for {list(known)}")
    settings["channel_mult"] = numbers("channel_mult", settings["channel_mult"] or known[size])
    settings["attention_resolutions"] = numbers("attention_resolutions", settings["attention_resolutions"])
    return settings


def _read(name: str, text: str) -> Any:
    kind, _ = _FLAGS[name]
    try:
        return kind(text)
    except (ValueError, KeyError):
        expected = "True or False" if kind is _truth else "a number"
        raise ValueError(f"{name} must be {expected} (got {text!r})") from None


def numbers(name: str, text: str) -> tuple[int | float, ...]:
    """The numbers of a list separated by commas; ValueError if it is none."""
    try:
        values = [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be numbers, separated by commas (got {text!r})") from None
    return tuple(int(value) if value.is_integer() else value for value in values)


def denoiser_config(settings: Mapping[str, Any], *, low_res: bool) -> DenoiserConfig:
    """The cascade stage of these settings, as `settings_of_flags` gives them.

    Raises:
        ValueError: a setting has no counterpart here.
    """
    steps = settings["diffusion_steps"]
    if settings["noise_schedule"] not in ("linear", "cosine"):
        raise ValueError(f"noise_schedule must be linear or cosine (got {settings['noise_schedule']!r})")
    fixed = "fixed_small" if settings["sigma_small"] else "fixed_large"
    return DenoiserConfig.model_validate(
        {
            "unet": unet_config(settings, low_res=low_res).model_dump(),
            "diffusion": {
                "schedule": {
                    "kind": "discrete",
                    "num_steps": steps,
                    "beta": settings["noise_schedule"],
                    "rescale_steps": settings["rescale_timesteps"] and steps != 1000,
                },
                "objective": "x0" if settings["predict_xstart"] else "eps",
                "variance": "learned_range" if settings["learn_sigma"] else fixed,
                "loss": "rescaled_kl" if settings["use_kl"] else "l2",
                "vb_weight": 0.001 if settings["rescale_learned_sigmas"] else 1 / steps,
            },
            "size_px": settings["image_size"],
            "low_res_px": settings["small_size"] if low_res else None,
            "low_res_upsampling": "bilinear" if low_res else "bicubic",
        }
    )


def sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A `SamplingConfig`, as plain values: how image_sample.py and super_res_sample.py sample with these flags.

    Raises:
        ValueError: timestep_respacing is none, or asks for more steps than there are.
    """
    total, sections = settings["diffusion_steps"], settings["timestep_respacing"]
    grid, num_steps = {"kind": "uniform"}, total
    if sections:
        steps = _steps(total, sections)
        grid, num_steps = {"kind": "respaced", "sections": sections}, len(steps)
        if steps != respaced_steps(total, sections):
            grid = {"kind": "listed", "steps": steps[::-1]}
    return {
        "sampler": {"kind": "ddim" if settings["use_ddim"] else "ancestral"},
        "grid": grid,
        "num_steps": num_steps,
        "threshold": {"kind": "static" if settings["clip_denoised"] else "none"},
        "start": "unit_variance",
    }


def _steps(total: int, sections: str) -> list[int]:
    """Increasing step indices, where theirs differ from ours: the first sections are longer, if lengths differ; one of
    one requested step gives its first; and strides are added up, which may round to a neighbour."""
    if sections.startswith("ddim"):
        return respaced_steps(total, sections)
    try:
        counts = [int(count) for count in sections.split(",")]
    except ValueError:
        raise ValueError(
            f"timestep_respacing must be numbers, separated by commas, or ddim and a number (got {sections!r})"
        ) from None
    found, start = [], 0
    for index, count in enumerate(counts):
        length = total // len(counts) + (index < total % len(counts))
        if not 1 <= count <= length:
            raise ValueError(
                f"timestep_respacing {sections}: {count} steps requested of {length}; request 1 to {length}"
            )
        stride = (length - 1) / max(1, count - 1)
        found += [start + round(position) for position in accumulate([0.0, *[stride] * (count - 1)])]
        start += length
    return found
